"""The SGLang extension."""


def activate() -> None:
    """Entry point of SGLang's plugin group."""
