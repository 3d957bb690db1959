"""How the sizes of files and what methods share are counted."""

from pathlib import Path

from tests.sizes import TABLES, counted_lines, excesses, long_functions, total, verbatim

ROOT = Path(__file__).resolve().parents[1]

METHOD = '''
"""A paper."""
import torch

@dataclass(frozen=True)
class Config:
    """Options."""
    lr: float = option(1e-4, "a rate")  # of Adam

class Helper:
    shared = "not counted"

class {name}(Method):
    """Idea."""
    def loss(self, x):
        """(B,) what
        is minimised."""
        # a reason
        y = self.student(
            x
        )
        return {loss}

METHOD = {name}
'''


def test_counted_are_the_lines_of_code_of_config_and_method() -> None:
    lines = counted_lines(METHOD.format(name="Own", loss="y.square()"))
    assert lines == ['lr: float = option(1e-4, "a rate")', "y = self.student(", "return y.square()"]


def test_a_line_is_shared_with_another_file_only() -> None:
    sources = {name: METHOD.format(name=name, loss=loss) for name, loss in {"A": "y.abs()", "B": "y.square()"}.items()}
    shares = verbatim(sources)
    assert shares == {"A": (2, 3), "B": (2, 3)} and total(shares) == 2 / 3
    twice = METHOD.format(name="A", loss="y.abs()\n        return y.abs()")
    assert verbatim({"A": twice, "B": "METHOD = B"}) == {"A": (0, 4), "B": (0, 0)}


def test_a_long_function_is_named() -> None:
    source = "def short():\n" + "    pass\n" * 59 + "def long():\n" + "    pass\n" * 60
    assert long_functions("a.py", source) == ["a.py: long, 61 lines"]
    assert not any(len(name.split(": ")) != 2 for name in TABLES)


def test_nothing_is_too_large() -> None:
    assert not excesses(ROOT)
