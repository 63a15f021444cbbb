"""Processors to whom a text that spells a special token is only a text, as it is to the rest of this package."""

from __future__ import annotations

from typing import Any


class SpeltTokensAreText:
    """Stands before a processor of transformers among the parents of a class."""

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As transformers does, but a special token that a text spells stays text, unless one says otherwise."""
        parent: Any = super()
        return parent.apply_chat_template(
            conversation,
            chat_template,
            tokenize=tokenize,
            sanitize_control_tokens=sanitize_control_tokens and tokenize,
            **kwargs,
        )
