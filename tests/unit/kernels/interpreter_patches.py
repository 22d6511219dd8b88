"""What Triton's interpreter lacks; conftest.py imports this where it is on."""

from triton import language
from triton.runtime import interpreter


def let_index_be_scalar() -> None:
    """The interpreter keeps scalars as arrays of one element, which newer versions of NumPy refuse as bounds of a loop."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def patch_language_once() -> None:
    """The interpreter patches Triton's language again for each function that a kernel calls: a third of its time."""
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_first(function):
        modules = frozenset(id(value) for value in function.__globals__.values() if value is language or value is language.core)
        if modules in patched:
            return interpreter._LangPatchScope()  # nothing to restore
        patched.add(modules)
        return patch(function)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()  # a launch restores what it patched
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_first, launch_afresh


let_index_be_scalar()
patch_language_once()
