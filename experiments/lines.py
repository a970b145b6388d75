"""How long the five files are, against the limits that keep them readable in an hour.

    python -m experiments.lines

A line of code is one that holds a token which is neither a comment nor part of a docstring. Exit code 1 where a limit is
broken: 1,200 lines of code and 1,700 in all, 40 lines a function (its docstring counts), 100 characters a line.
"""
import argparse
import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pgpo.py", "reward.py", "model.py", "rollout.py", "train.py")
MOST_CODE, MOST_LINES, MOST_IN_FUNCTION, MOST_WIDE = 1200, 1700, 40, 100
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def docstring_lines(tree: ast.AST) -> set[int]:
    """The lines of all docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(source: str) -> int:
    """How many lines hold code.

    >>> code_lines('"No code."\\n\\nx = f(1,  # one\\n      2)\\n# no code\\n')
    2
    """
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(source)))


def problems(name: str, source: str) -> list[str]:
    """Functions that are too long and lines that are too wide."""
    found = [f"{name}:{node.lineno}: {node.name} has {size} lines, more than {MOST_IN_FUNCTION}"
             for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
             and (size := node.end_lineno - node.lineno + 1) > MOST_IN_FUNCTION]
    return found + [f"{name}:{number}: {len(line)} characters, more than {MOST_WIDE}"
                    for number, line in enumerate(source.splitlines(), 1) if len(line) > MOST_WIDE]


def main() -> list[str]:
    """Print the table; returns what breaks a limit."""
    print("| file | code | in all |\n|---|---|---|")
    broken, totals = [], [0, 0]
    for name in FILES:
        source = (ROOT / name).read_text()
        sizes = code_lines(source), len(source.splitlines())
        totals = [total + size for total, size in zip(totals, sizes)]
        broken += problems(name, source)
        print(f"| {name} | {sizes[0]} | {sizes[1]} |")
    print(f"| all five (limit {MOST_CODE:,} and {MOST_LINES:,}) | {totals[0]:,} | {totals[1]:,} |")
    if totals[0] > MOST_CODE or totals[1] > MOST_LINES:
        broken.append(f"{totals[0]:,} lines of code, {totals[1]:,} in all: above the limit")
    return broken


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if broken := main():
        raise SystemExit("\n".join(broken))
