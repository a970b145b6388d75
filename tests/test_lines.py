"""The limits that keep the five files readable in an hour."""
import pytest

from experiments import lines


def test_the_five_files_keep_within_their_limits(capsys):
    assert (lines.MOST_CODE, lines.MOST_LINES, lines.MOST_IN_FUNCTION, lines.MOST_WIDE) == (1200, 1700, 40, 100)
    assert lines.main() == []
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in table[:-1]] == ["pgpo.py", "reward.py", "model.py", "rollout.py", "train.py"]
    sums = [sum(int(row[column].replace(",", "")) for row in table[:-1]) for column in (1, 2)]
    assert sums == [int(cell.replace(",", "")) for cell in table[-1][1:]] and 500 < sums[0] < sums[1]


def test_what_counts_as_code():
    """Blank lines, comments and docstrings do not, whatever holds them; strings that are used do, on all their lines."""
    source = ('"""A file.\n\nOf two."""\n# a comment\n\nclass A:\n    """One."""\n\n    def f(self):\n        "Two."\n'
              '        x = """three\n\n        four"""\n')
    assert lines.code_lines(source) == 5        # class, def and the three lines of x
    assert lines.code_lines("x = (1,  # one\n\n     2); y = 3\n") == 2


@pytest.mark.parametrize("body,count", [(38, 0), (39, 0), (40, 1)])
def test_a_function_above_forty_lines_and_a_wide_line_are_found(body, count):
    """Its docstring and comments count, the functions inside it too."""
    source = "class A:\n    def f():\n" + "        # why\n" * (body - 1) + "        pass\n"
    assert len(lines.problems("a.py", source)) == count
    assert len(lines.problems("a.py", source + "x" * 100 + "\n" + "y" * 101 + "\n")) == count + 1
