"""The SGLang extension: flags, hooks, the radix cache and its linker. The only place that knows sglang."""


def activate() -> None:
    """Entry point of SGLang's plugin group: adds the flags and, where a scheduler runs, the radix-cache backend."""
    from sglang_kvcodec.plugin.hooks import register

    register()
