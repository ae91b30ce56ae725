"""What an answer must look like, over the tokens of one model: JSON by a schema, or a Lark grammar.

Contract: a grammar tells which tokens may come next, at any place of an answer; it is compiled once and then
serves every answer. What somebody sends may be hostile: it ends in an error, within bounded time and memory.
The only place that knows llguidance. Must not know models, requests, or why something must look so.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from decimal import Decimal
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from draftloop.errors import BackendUnavailable, GrammarFailed, InputError, ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from draftloop.models.tokenizer import Tokenizer

MOST_CHARACTERS = 128 * 1024
"""Of a schema, as JSON, or of a Lark grammar. The OpenAI API takes 120,000."""
WHITESPACE = r" |\r?\n[ \t]{0,40}"
"""Between two parts of a JSON text: a blank, or a line break and an indentation. A model whose own choice the
schema forbids writes blanks for as long as it may."""
MOST_REASON = 300
"""Characters of the library's own words in an error: they may hold what was sent."""
MOST_MULTIPLE = 100_000
"""What every `multipleOf` of a schema may come to together, in steps of the finest. The library looks at each
remainder, unless they come to a power of ten: this many take a second, ten times as many fifteen."""
_MULTIPLE = re.compile(r'"multipleOf": ([0-9.]+(?:[eE][+-]?[0-9]+)?)')
"""As `json.dumps` writes it, in a schema or in a Lark grammar that holds one."""
KEPT_GRAMMARS = 16
"""So many compiled ones are kept, the newest."""
_STACK_BYTES = 256 * 2**20
"""The compiler calls itself once for each reference to another part of a schema, and some 10 KB go with each
call: MOST_CHARACTERS of references fill a tenth of this. Only what is used is taken of the memory."""
OPTIONS_KEYWORD = "x-guidance"
"""By which a schema could tell the library to ignore what it does not support."""
_OPTIONS = {
    "whitespace_pattern": WHITESPACE,
    "lenient": False,
    "coerce_one_of": False,
}


class Grammars:
    """Compiles grammars for one model's tokens, and keeps the newest. Any thread may ask.

    Args:
        tokenizer: the model's.
        vocab_size: V, the target's own, padding included.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()

    def json_object(self) -> Grammar:
        """Any JSON object.

        Raises:
            ModelUnreadable: the model's tokenizer is of a kind that grammars cannot be laid over.
        """
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that is valid by `schema`. Properties come in the schema's order.

        Raises:
            InputError: a keyword that is not supported, named; or the schema is wrong, contradicts itself, or
                is too large.
            ModelUnreadable: as `json_object`.
        """
        try:
            text = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"the schema is not JSON: {error}", remedy="Send a JSON schema that is nested less deeply."
            ) from error
        return self._grammar("schema", text)

    def lark(self, text: str) -> Grammar:
        """A grammar in llguidance's dialect of Lark, which may hold JSON schemas (`%json {…}`).

        Schemas in it may have `OPTIONS_KEYWORD` at their top: who writes the grammar sees to what it says.

        Raises:
            InputError: the grammar is wrong, or too large.
            ModelUnreadable: as `json_object`.
        """
        return self._grammar("grammar", text)

    def _grammar(self, kind: str, text: str) -> Grammar:
        if len(text) > MOST_CHARACTERS:
            raise InputError(
                f"the {kind} has {len(text)} characters", remedy=f"Send at most {MOST_CHARACTERS}."
            )
        if kind == "schema" and f'"{OPTIONS_KEYWORD}"' in text:
            raise InputError(
                f"the {kind} has the keyword {OPTIONS_KEYWORD}, which is not supported",
                remedy="Leave it out.",
            )
        _check_multiples(kind, text)
        with self._lock:
            grammar = self._kept.get((kind, text))
            if grammar is None:
                grammar = _with_room(lambda: self._compile(kind, text))
                self._kept[kind, text] = grammar
            self._kept.move_to_end((kind, text))
            while len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
            return grammar

    def _compile(self, kind: str, text: str) -> Grammar:
        library = _library()
        if self._tokens is None:
            self._tokens = self._lay_tokens(library)
        try:
            source = (
                library.LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
                if kind == "schema"
                else library.LLMatcher.grammar_from_lark(text)
            )
        except ValueError as error:
            raise _refused(kind, str(error)) from error
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = library.LLMatcher(self._tokens, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(kind, matcher.get_error())
        grammar = Grammar(matcher, self._vocab_size)
        try:
            grammar.start().allowed(())
        except GrammarFailed as error:
            raise _refused(kind, error.what) from error
        return grammar

    def _lay_tokens(self, library: Any) -> Any:
        """The tokens as the library needs them; takes a second for 150,000."""
        eos = sorted(token for token in self._tokenizer.eos_token_ids if token < self._vocab_size)
        try:
            return library.LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=eos)
        except Exception as error:  # the library's Rust core raises bare ones
            raise ModelUnreadable(
                f"grammars cannot be laid over this model's tokenizer: {error}",
                remedy="Ask without a schema, or choose a model with byte-level tokens.",
            ) from error


class Grammar:
    """One that is compiled."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def start(self) -> GrammarState:
        """At the beginning of an answer."""
        return GrammarState(self._matcher.deep_copy(), self._vocab_size)


class GrammarState:
    """A grammar at one place of one answer.

    It looks ahead by walking on and coming back: neighbouring questions cost one step each.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ahead: list[int] = []
        self.ended = False
        """Whether nothing but the answer's end may follow."""

    def allowed(self, drafted: Sequence[int]) -> NDArray[np.bool_] | None:
        """Which tokens may follow `drafted`, [V], at least one.

        Returns:
            None behind what is forbidden, and behind the end.

        Raises:
            GrammarFailed: the grammar became too complex here, or no token can write what must follow.
        """
        if not self._walk(drafted) or (drafted and self._matcher.is_stopped()):
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].view(np.bool_)
        if not allowed.any():
            raise GrammarFailed(
                "no token can write what the grammar demands here", remedy="Choose another schema or model."
            )
        return allowed

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` may follow, one after another; the end may be the last.

        Raises:
            GrammarFailed: the grammar became too complex here.
        """
        self._walk(())
        known = list(takewhile(lambda token: token < self._vocab_size, tokens))
        count = int(self._matcher.validate_tokens(known))
        self._check()
        return count

    def advance(self, tokens: Sequence[int]) -> int:
        """Go on by what was emitted, and tell how many of `tokens` there were up to the end.

        Raises:
            GrammarFailed: one of them is forbidden, or the grammar became too complex here.
        """
        kept = 0
        while kept < len(tokens) and not self.ended:
            kept += 1
            if not self._walk(tokens[:kept]):
                raise GrammarFailed(
                    f"the grammar forbids token {tokens[kept - 1]}, which was emitted",
                    remedy="This is a defect; please report it.",
                )
            self.ended = self._matcher.is_stopped()
        self._ahead = []
        return kept

    def _walk(self, drafted: Sequence[int]) -> bool:
        """Stand behind `drafted`; False where something in it is forbidden."""
        pairs = zip(self._ahead, drafted, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if shared < len(self._ahead):
            self._matcher.rollback(len(self._ahead) - shared)
            del self._ahead[shared:]
        for token in drafted[shared:]:
            # A token that is consumed and forbidden would end the matcher for good.
            if token >= self._vocab_size or self._matcher.validate_tokens([token]) < 1:
                self._check()
                return False
            self._matcher.consume_token(token)
            self._ahead.append(token)
        self._check()
        return True

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarFailed(
                f"the grammar cannot be followed any further: {_first_line(self._matcher.get_error())}",
                remedy="Choose a simpler schema.",
            )


def _check_multiples(kind: str, text: str) -> None:
    """Refuse steps between numbers that would keep the compiler busy for minutes, with all memory.

    Raises:
        InputError: the least common multiple of all, in steps of the finest, is too large.
    """
    steps = {Decimal(found) for found in _MULTIPLE.findall(text)} - {0}
    finest = min((int(step.as_tuple().exponent) for step in steps), default=0)
    together = 1
    for step in steps:
        together = math.lcm(together, int(step.scaleb(-min(finest, 0))))
        others = together
        while others % 10 == 0:
            others //= 10
        if together > MOST_MULTIPLE and others > 1:
            raise InputError(
                f"multipleOf in the {kind} comes to more than {MOST_MULTIPLE} remainders",
                remedy="Choose steps between numbers with a smaller least common multiple.",
            )


def _with_room(work: Callable[[], Grammar]) -> Grammar:
    """Do it in a thread with a stack that recursion does not fill; an overflow would end the process."""
    found: list[Grammar] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    before = threading.stack_size(_STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="grammar")
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise BackendUnavailable(
            "llguidance is not installed, and a grammar needs it",
            remedy="Install draftloop with its extra: server.",
        ) from error
    return llguidance


def _refused(kind: str, reason: str) -> InputError:
    return InputError(
        f"the {kind} cannot be used: {_first_line(reason)}",
        remedy="Leave that out, or say it in another way.",
    )


def _first_line(text: str) -> str:
    line = next(iter(text.strip().splitlines()), "no reason is given").rstrip(".")
    return line if len(line) <= MOST_REASON else f"{line[:MOST_REASON]}…"
