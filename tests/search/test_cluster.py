"""A Ray cluster of two nodes on this machine: workers die, and what comes out is what one process makes."""

from __future__ import annotations

import functools
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.search import fakes
from tests.search.fakes import FakeEncoder
from tests.search.files import pdf, write_image
from tests.search.test_embed import content

from quarterlight.errors import CheckpointError, InputError
from quarterlight.index.shards import ShardFolder
from quarterlight.records import Item
from quarterlight.search.cluster import Cluster
from quarterlight.search.embed import EmbedConfig, Local, embed
from quarterlight.search.encoder import identity_of

ray = pytest.importorskip("ray", reason="needs ray: pip install -e '.[ray]'")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own, in code that it calls

SMALL = EmbedConfig(items_per_shard=4, items_per_group=2)


class Mortal(FakeEncoder):
    """Kills the process that it is in, unless that has happened before.

    mark: made when it does.  nodes: folder of the names of the nodes that it worked on.
    """

    def __init__(self, mark: Path, nodes: Path) -> None:
        super().__init__()
        self.mark, self.nodes = mark, nodes

    def encode_document(self, items: Sequence[Item], *, instruction: str | None = None) -> npt.NDArray[np.float32]:
        (self.nodes / ray.get_runtime_context().get_node_id()).touch()
        if self.num_encoded >= 2 and not self.mark.exists():  # in the midst of its work
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_document(items)


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    """Two nodes of a CPU each, which all tests share: most of their time goes into starting their processes."""
    import sys

    from ray.cluster_utils import Cluster as Nodes

    ray.cloudpickle.register_pickle_by_value(fakes)  # the workers cannot import the tests
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    each: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    nodes = Nodes(initialize_head=True, head_node_args=each)
    nodes.add_node(**each)
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for number in range(6):
        write_image(folder / f"{number}.png", (10 * number, 200, 30))
    (folder / "fruit.pdf").write_bytes(pdf(["apples", None, "plums"]))
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "list.jsonl").write_text('{"id": 1, "text": "words"}\n{"id": 2, "image": "1.png"}\n{"id": 3}\n')
    return folder


def test_a_killed_worker_loses_nothing(local: None, corpus: Path, tmp_path: Path) -> None:
    mark, nodes = tmp_path / "killed", tmp_path / "nodes"
    nodes.mkdir()
    cluster = Cluster.connect("auto", functools.partial(Mortal, mark, nodes), num_workers=2)
    identity = cluster.identity()
    assert identity == identity_of(FakeEncoder())
    inputs = [corpus, corpus / "list.jsonl"]
    report = embed(inputs, ShardFolder.create(tmp_path / "ray", identity), cluster, config=SMALL)
    assert mark.exists(), "a worker was killed at work"
    assert len(list(nodes.iterdir())) == 2, "a worker on each node had a part in it"
    alone = embed(inputs, ShardFolder.create(tmp_path / "alone", identity), Local(FakeEncoder()), config=SMALL)
    assert content(tmp_path / "ray") == content(tmp_path / "alone")
    assert len(content(tmp_path / "ray")) == report.num_rows == 10
    assert report.problems == alone.problems and len(report.problems) == 3
    names = [sorted(path.name for path in (tmp_path / one / "shards").iterdir()) for one in ("ray", "alone")]
    assert names[0] == names[1]


def broken() -> FakeEncoder:
    raise CheckpointError("There is no such model.")


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_nobody_at_the_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever the other tests have started
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that is free once it is closed
        port = server.getsockname()[1]
    with pytest.raises(InputError, match=rf"no Ray cluster at '.*{port}': Connection refused. Start one with"):
        Cluster.connect(address.format(port), FakeEncoder)


def test_what_goes_wrong(local: None) -> None:
    with pytest.raises(CheckpointError, match="no such model"):
        Cluster(broken).identity()
    with pytest.raises(InputError, match="has 2 CPUs, which is too few for 3 workers"):
        Cluster(FakeEncoder, 3).identity()
