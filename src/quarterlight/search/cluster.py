"""Bulk embedding on the workers of a Ray cluster.

Ray Data streams shards through two pools of actors, of which the first decodes and the second holds a model each; what
it keeps in between fits the cluster's memory.  When a worker or a node dies, Ray gives its work to another; what had
come back already is recognised.  Workers need Quarterlight installed and the files under the same names; only this
process writes.
"""

from __future__ import annotations

import functools
import logging
import pickle
import socket
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from quarterlight.errors import InputError, QuarterlightError
from quarterlight.index import ModelIdentity
from quarterlight.models.quantized import Quantization
from quarterlight.search.embed import EmbedConfig, Group, Shard, decode, encode
from quarterlight.search.encoder import Encoder, Pictures, identity_of

MODEL_CPUS = 0.8
"""What a model on a CPU claims of it, so that as many models as there are CPUs leave room for those who decode."""

DECODER_CPUS = 0.2
"""Claimed by an actor that decodes where models are on CPUs; beside models on GPUs it is 1."""

CONNECT_SECONDS = 5.0
"""How long the machine of an address may take to answer; Ray itself would try for many minutes."""

CLIENT_PORT = 10001
"""Of ``ray://`` addresses that name none, as Ray has it."""

MAX_BLOCKS = 2000
"""Pieces in which shards are handed out; Ray's bookkeeping grows with them."""


@dataclass(frozen=True)
class Cluster:
    """An :class:`quarterlight.search.embed.Engine` on the Ray cluster to which this process is connected.

    open_encoder: called on each worker.
    num_workers: models; ``None`` is one for each GPU, or for each CPU where there are no GPUs.
    Raises InputError for more workers than the cluster has GPUs or CPUs.
    """

    open_encoder: Callable[[], Encoder]
    num_workers: int | None = None

    @classmethod
    def connect(cls, address: str, open_encoder: Callable[[], Encoder], *, num_workers: int | None = None) -> Cluster:
        """Connected to a cluster: ``local`` starts one on this machine, anything else is an address as Ray knows them.

        Raises InputError when there is none.
        """
        import ray
        import ray.data  # sets its own level when it is imported

        logging.getLogger("ray.data").setLevel(logging.ERROR)  # else it tells of every run that it began and ended
        if not ray.is_initialized():
            options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            try:
                _knock(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **options)
            except (OSError, ValueError, RuntimeError) as error:
                told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                reason = " ".join(told.split()).rstrip(".")
                raise InputError(
                    f"There is no Ray cluster at {address!r}: {reason}. Start one with `ray start --head`, or use "
                    "`--ray local` for this machine."
                ) from error
        return cls(open_encoder, num_workers)

    def check(self) -> None:
        """Raises InputError where the cluster is too small for the workers, which else is found when they are used."""
        self._resources()

    def identity(self) -> ModelIdentity:
        """Of the model, which a worker opens for it; raises what goes wrong there."""
        return self._model[0]

    @functools.cached_property
    def _model(self) -> tuple[ModelIdentity, Pictures]:
        """Of the model, what this process and those that decode must know."""
        import ray

        task = ray.remote(_about).options(**self._resources()[1])
        try:
            return ray.get(task.remote(self.open_encoder))
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from error

    def __call__(self, shards: Sequence[Shard], config: EmbedConfig, /) -> Iterator[Group]:
        """Groups with vectors, in any order."""
        import ray.data

        num_workers, of_model, num_decoders, of_decoder = self._resources()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = config.bytes_per_group  # or a model waits until a whole shard is decoded
        data: ray.data.Dataset = ray.data.from_items(
            [{"shard": pickle.dumps(shard)} for shard in shards], override_num_blocks=min(len(shards), MAX_BLOCKS)
        )
        one: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
        data = data.map_batches(
            _Decoder,
            fn_constructor_args=(config, self._model[1]),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=num_decoders),
            **one,
            **of_decoder,
        )
        data = data.map_batches(
            _Model,
            fn_constructor_args=(self.open_encoder,),
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            **one,
            **of_model,
        )
        try:
            for batch in data.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1):
                yield _unpack(batch, "group")
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from error

    def _resources(self) -> tuple[int, dict[str, Any], int, dict[str, Any]]:
        """How many models, what each claims, how many actors that decode at most, and what each of them claims."""
        import ray

        has = ray.cluster_resources()
        num_gpus, num_cpus = int(has.get("GPU", 0)), int(has.get("CPU", 0))
        kind, most = ("GPUs", num_gpus) if num_gpus else ("CPUs", num_cpus)
        num_workers = most if self.num_workers is None else self.num_workers
        if not 1 <= num_workers <= most:
            raise InputError(f"The Ray cluster has {most} {kind}, which is too few for {num_workers} workers.")
        if num_gpus:
            return num_workers, {"num_gpus": 1, "num_cpus": 0}, max(1, num_cpus - 1), {"num_cpus": 1}
        return num_workers, {"num_cpus": MODEL_CPUS}, max(1, num_cpus), {"num_cpus": DECODER_CPUS}


def _knock(address: str) -> None:
    """Raises OSError when nobody answers at ``HOST:PORT`` or ``ray://HOST``; other addresses are names for Ray."""
    place = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    port = place.port or (CLIENT_PORT if place.scheme == "ray" else None)
    if place.hostname and port:
        socket.create_connection((place.hostname, port), timeout=CONNECT_SECONDS).close()


def open_embedder(model: str, quantization: Quantization | None = None) -> Encoder:
    """The embedder of that name, on the machine that asks."""
    from quarterlight.models.embedder import Embedder

    return Embedder(model, quantization=quantization)


def embedder_opener(model: str, quantization: Quantization | None = None) -> Callable[[], Encoder]:
    """What a worker calls for its model."""
    return functools.partial(open_embedder, model, quantization)


class _Decoder:
    def __init__(self, config: EmbedConfig, pictures: Pictures) -> None:
        self.config = config
        self.pictures = pictures

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for group in decode(_unpack(batch, "shard"), self.config, self.pictures):
            yield _pack(group, "group")


class _Model:
    def __init__(self, open_encoder: Callable[[], Encoder]) -> None:
        self.encoder = open_encoder()

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _pack(encode(_unpack(batch, "group"), self.encoder), "group")


def _about(open_encoder: Callable[[], Encoder]) -> tuple[ModelIdentity, Pictures]:
    encoder = open_encoder()
    return identity_of(encoder), encoder.pictures


def _pack(value: Any, name: str) -> pa.Table:
    return pa.table({name: pa.array([pickle.dumps(value, protocol=5)], pa.large_binary())})


def _unpack(batch: pa.Table, name: str) -> Any:
    (packed,) = batch[name].to_pylist()
    return pickle.loads(packed)


def _cause(error: Any) -> Exception:
    """What went wrong on a worker: the user's mistake as it was raised there, or else all of Ray's report."""
    return error.cause if isinstance(error.cause, QuarterlightError) else error
