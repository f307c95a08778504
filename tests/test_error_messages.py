"""Every error and warning text of the package is asserted by some test, and says what was given.

What is compared are the constant parts of the message, as it stands in the source, with the texts
that the tests assert: `match=`, `assert`, and the cases that tests are parametrized with. Whether
the line that raises also ran is the coverage's to say.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import torchclust

PACKAGE, TESTS = Path(torchclust.__file__).parent, Path(__file__).parent
ENOUGH = 14  # characters in a row that a test and a message share by intent, not by chance
PASSED_ON = 6  # a message with fewer of its own, such as f"{file}: {error}", is another's
INTERNAL = ("AssertionError", "NotImplementedError", "KeyboardInterrupt")  # no user meets them


def constants(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def fragments(message: ast.expr) -> list[str]:
    """A message's constant parts; what stands inside placeholders is not its text."""
    match message:
        case ast.Constant(str(text)):
            return [text]
        case ast.JoinedStr(parts):
            return [text for part in parts for text in fragments(part)]
        case ast.BinOp(left=left, right=right) | ast.IfExp(body=left, orelse=right):
            return fragments(left) + fragments(right)
    return []


def messages() -> dict[str, list[str]]:
    """Where in the package -> the fragments of what is raised or warned there."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            if name not in INTERNAL and (isinstance(node, ast.Raise) or name.endswith("warn")):
                texts = fragments(call.args[0])
                if max(map(len, texts), default=0) >= PASSED_ON:
                    found[f"{file.relative_to(PACKAGE.parent)}:{node.lineno}"] = texts
    return found


def asserted() -> set[str]:
    found = set()
    for file in sorted(set(TESTS.rglob("test_*.py")) - {Path(__file__)}):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.keyword(arg="match", value=place) | ast.Assert(test=place):
                    found |= set(constants(place))
                case ast.Assign(value=place) | ast.AnnAssign(value=ast.expr() as place):
                    found |= set(constants(place))
                case ast.FunctionDef(decorator_list=places):
                    found |= {text for place in places for text in constants(place)}
    return {text.replace("\\", "") for text in found}  # of a regular expression, what it matches


def unasserted(messages: dict[str, list[str]], asserted: set[str]) -> dict[str, list[str]]:
    """The messages of which no test asserts `ENOUGH` characters in a row."""

    def pieces(text: str, length: int) -> set[str]:
        return {text[start : start + length] for start in range(len(text) - length + 1)}

    lengths = {where: min(ENOUGH, max(map(len, texts))) for where, texts in messages.items()}
    known = {
        length: {piece for text in asserted for piece in pieces(text, length)}
        for length in set(lengths.values())
    }
    return {
        where: texts
        for where, texts in messages.items()
        if not any(pieces(text, lengths[where]) & known[lengths[where]] for text in texts)
    }


def test_every_message_is_asserted_by_a_test() -> None:
    assert unasserted(messages(), asserted()) == {}


def test_that_test_finds_messages_and_can_fail() -> None:
    found = messages()
    assert len(found) > 150
    texts = {"".join(texts) for texts in found.values()}
    assert any("must be at least 1, got" in text for text in texts)
    missing = {"here.py:1": ["the moon is ", " miles too far away"]}
    assert unasserted(missing, asserted()) == missing
    assert unasserted(missing, {"the moon is 3 miles too far away"}) == {}
