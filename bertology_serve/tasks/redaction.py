"""Redaction: what a model and regular expressions find in a text is masked, hashed, or replaced and can be restored.

A call asks for it beside its text: ``redact`` says what becomes of the model's labels, ``patterns`` which expressions
are looked for beside the model, ``offsets`` whether spans count UTF-16 units too.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from bertology_serve.errors import DataError, FormatError, LimitError, SpecError, Unsupported, nearest
from bertology_serve.tasks.base import Answer
from bertology_serve.tasks.fields import Record, kind_of
from bertology_serve.tasks.spec import QUESTION_ANSWERING, TOKEN_CLASSIFICATION, TaskSpec
from bertology_serve.tasks.token_classification import split_tag

KEEP, MASK, HASH, REPLACE = POLICIES = ("keep", "mask", "hash", "replace")
REDACTION_FIELDS = frozenset(("redact", "patterns", "offsets"))
OTHERS = "*"  # the labels that a policy does not name
OFFSETS = ("characters", "utf16")
DIGITS = 12  # of a hash, hexadecimal
LEAST_KEY, MOST_PATTERNS, MOST_BYTES = 16, 64, 1 << 20  # of a file: characters of its key, patterns, bytes
_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_PLACEHOLDER = re.compile(r"\[[^\[\]]*\]")
Policies = Mapping[str, str]


class Pattern(NamedTuple):
    """A regular expression; ``check(text, start, end)`` says where a match really ends, 0 for none."""

    expression: re.Pattern[str]
    check: Callable[[str, int, int], int] = lambda text, start, end: end

    def spans(self, text: str) -> Iterable[tuple[int, int]]:
        """Start and end of each match, in order; none is empty, none overlaps another."""
        at = 0
        while at < len(text) and (match := self.expression.search(text, at)):
            start, end = match.span()
            end = self.check(text, start, end) if end > start else 0
            if end:
                yield start, end
            at = end or start + 1


def restore(redacted: str, placeholders: Mapping[str, str]) -> str:
    """The text that was redacted, from an answer's ``redacted`` and ``placeholders`` (``{"[PER_1]": "Ada"}``).

    Placeholders may have moved, and other words between them may have changed, as where a language model wrote an
    answer with them. What was masked or hashed stays so.
    """
    return _PLACEHOLDER.sub(lambda found: placeholders.get(found[0], found[0]), redacted)


class Redactor:
    """What a server or a pipeline knows of redaction: the packaged patterns and its own, and the key of its hashes.

    ``patterns`` are regular expressions by names of capitals; they run on every text whose call names them, so that
    they are the operator's to give and never a call's. With a ``key`` hashes are HMAC-SHA-256, without one plain
    SHA-256, from which whoever has it finds a name or a number by trying all. Raises SpecError for a name or an
    expression that cannot be used.
    """

    def __init__(self, patterns: Mapping[str, str] | None = None, key: str = "") -> None:
        self.key, own = key.encode(), dict[str, Pattern]()
        if key and len(key) < LEAST_KEY:
            raise SpecError(f"the key of hashes has {len(key)} characters; expected at least {LEAST_KEY}")
        if len(patterns or {}) > MOST_PATTERNS:
            raise SpecError(f"there are {len(patterns or {})} patterns; expected at most {MOST_PATTERNS}")
        for name, expression in (patterns or {}).items():
            if not _NAME.fullmatch(name):
                raise SpecError(f"pattern {name[:40]!r}; expected a name of capitals, digits and underscores")
            try:
                own[name] = Pattern(re.compile(expression))
            except (re.error, TypeError, RecursionError, OverflowError) as problem:
                raise SpecError(f"pattern {name!r} is no regular expression: {problem}; correct it") from None
        self.patterns: Mapping[str, Pattern] = PATTERNS | own

    @classmethod
    def read(cls, path: Path) -> Redactor:
        """From a JSON file, ``{"key": "...", "patterns": {"ORDER": "\\\\bA-[0-9]{6}\\\\b"}}``; both may be left out.

        Raises FormatError for another file, SpecError as the class.
        """
        try:
            with path.open("rb") as file:
                values = json.loads(file.read(MOST_BYTES))
        except OSError as problem:
            raise FormatError(f"cannot read {path}: {problem.strerror}; expected a file of JSON") from None
        except (ValueError, RecursionError) as problem:
            raise FormatError(f"{path} is not valid JSON: {problem}; write the file again") from None
        if not isinstance(values, dict) or not values.keys() <= {"key", "patterns"}:
            raise FormatError(f"{path} holds something else; expected an object with 'key', 'patterns', or both")
        key, patterns = values.get("key", ""), values.get("patterns", {})
        if not isinstance(key, str) or not isinstance(patterns, dict):
            raise FormatError(f"{path}: expected a text under 'key', expressions by name under 'patterns'")
        return cls(patterns, key)

    def asked(self, record: Record, where: str, task: TaskSpec) -> Redaction | None:
        """What a record asks for beside its text; None: nothing. Raises DataError; Unsupported where the task has no
        spans.
        """
        redact, patterns = record.get("redact"), record.get("patterns")
        utf16 = _choice(record.get("offsets"), where, "offsets", OFFSETS) == "utf16"
        redacts = redact not in (None, False) or patterns not in (None, False)
        if task.kind not in ((TOKEN_CLASSIFICATION,) if redacts else _SPANNED) and (redacts or utf16):
            what = "redact" if redacts else "offsets"
            raise Unsupported(f"{where}: {task.kind} finds no spans; leave {what!r} out, or ask {TOKEN_CLASSIFICATION}")
        if not redacts:
            return Redaction({}, {}, {}, b"", utf16, redacts) if utf16 else None
        labels = dict.fromkeys(name for tag in task.labels if (name := split_tag(tag)[1]))
        named = patterns if not isinstance(patterns, list) else dict.fromkeys(map(str, patterns), MASK)
        own = _policies(named, where, "patterns", self.patterns, KEEP)
        policies = _policies(True if redact is None else redact, where, "redact", labels, MASK)
        chosen = {name: self.patterns[name] for name, policy in own.items() if policy != KEEP}
        return Redaction(policies, own, chosen, self.key, utf16, redacts)


@dataclass(frozen=True)
class Redaction:
    """What one request asks for: a policy for each of the model's labels and for each of ``patterns``."""

    labels: Policies
    named: Policies
    patterns: Mapping[str, Pattern]
    key: bytes
    utf16: bool
    redacts: bool

    def check(self, cut: int, where: str) -> None:
        """LimitError where tokens of the text are not read: what stands there would go out as it is."""
        if self.redacts and cut:
            raise LimitError(
                f"{where}: the last {cut} tokens are not read, so that the text cannot be redacted; send it in parts "
                "(deltas that are trained with --long windows read up to 64 of them)"
            )

    def of(self, text: str, answer: Answer) -> Answer:
        """What an answer gains: ``redacted``, ``redactions``, ``placeholders``, and the spans in UTF-16 units too."""
        more = self._redacted(text, answer["entities"]) if self.redacts else {}
        if self.utf16:
            unit = utf16_units(text)
            for name in ("entities", "redactions", "answers"):
                if name in answer or name in more:
                    more[name] = [_in_units(span, unit) for span in (more if name in more else answer)[name]]
            if "answer" in answer:
                more["answer"] = _in_units(answer["answer"], unit)
        return more

    def _redacted(self, text: str, entities: Sequence[Answer]) -> Answer:
        """Every character that a span covers whose policy is not to keep it is redacted, once.

        Where spans overlap the longest has it; of equally long ones the model's, then the first; what is left of the
        other is redacted by itself.
        """
        found: list[tuple[int, int, str, str]] = [
            (one["start"], one["end"], one["label"], self.labels[one["label"]]) for one in entities
        ]
        for name, pattern in self.patterns.items():
            found += [(start, end, name, self.named[name]) for start, end in pattern.spans(text)]
        found = [span for span in found if span[3] != KEEP]
        found.sort(key=lambda span: span[0] - span[1])
        owners: list[int | None] = [None] * len(text)
        for number, (start, end, _, _) in enumerate(found):
            owners[start:end] = [number if owner is None else owner for owner in owners[start:end]]
        writer, at, parts, redactions = _Writer(text, self.key, [label for _, _, label, _ in found]), 0, [], []
        for owner, own in groupby(owners):
            start, at = at, at + sum(1 for _ in own)
            surface = text[start:at]
            if owner is None:
                parts.append(surface)
                continue
            _, _, label, policy = found[owner]
            parts.append(writer.written(label, policy, surface))
            redactions.append({"label": label, "start": start, "end": at, "text": surface, "replacement": parts[-1]})
        answer: Answer = {"redacted": "".join(parts), "redactions": redactions}
        return answer | ({"placeholders": writer.placeholders} if writer.placeholders else {})


class _Writer:
    """What is written for a surface. No placeholder that stands for a surface is anything else in the text."""

    def __init__(self, text: str, key: bytes, labels: Iterable[str]) -> None:
        self._key, self._numbers, self._known = key, dict[str, int](), dict[tuple[str, str], str]()
        self._taken = {*_PLACEHOLDER.findall(text), *(f"[{_plain(label)}]" for label in labels)}
        self.placeholders: dict[str, str] = {}

    def written(self, label: str, policy: str, surface: str) -> str:
        name = _plain(label)
        if policy == MASK:
            return f"[{name}]"
        if policy == HASH:
            data = surface.encode()
            made = hmac.new(self._key, data, hashlib.sha256) if self._key else hashlib.sha256(data)
            return f"[{name}:{made.hexdigest()[:DIGITS]}]"
        if (label, surface) not in self._known:
            self._known[label, surface] = placeholder = self._next(name)
            self.placeholders[placeholder] = surface
        return self._known[label, surface]

    def _next(self, name: str) -> str:
        while True:
            self._numbers[name] = self._numbers.get(name, 0) + 1
            placeholder = f"[{name}_{self._numbers[name]}]"
            if placeholder not in self._taken:
                return placeholder


def _plain(label: str) -> str:
    """A label as placeholders hold it."""
    return re.sub(r"[^\w.-]", "_", label)


_SPANNED = (TOKEN_CLASSIFICATION, QUESTION_ANSWERING)


def utf16_units(text: str) -> Callable[[int], int]:
    """What gives for an offset in characters of a text that in UTF-16 units, as JavaScript, Java and .NET count."""
    units, total = [0], 0
    for character in text:
        total += 2 if character > "\uffff" else 1
        units.append(total)
    return units.__getitem__


def _in_units(span: Answer, unit: Callable[[int], int]) -> Answer:
    """A span with both of its ends in UTF-16 units too."""
    return span | {"start_utf16": unit(span["start"]), "end_utf16": unit(span["end"])}


def _choice(value: object, where: str, name: str, known: Sequence[str]) -> str:
    if value is not None and value not in known:
        raise DataError(f"{where}: field {name!r} is {kind_of(value)}; expected {' or '.join(map(repr, known))}")
    return str(value or known[0])


def _policies(value: object, where: str, field: str, known: Iterable[str], otherwise: str) -> dict[str, str]:
    """The policy of each known name, from ``true``, one policy for all, or policies by name (``*``: all others)."""
    if not isinstance(value, Mapping):
        value = {OTHERS: MASK if value is True else KEEP if value in (None, False) else value}
    names = [*known, OTHERS]
    for name, policy in value.items():
        if name not in names:
            raise DataError(
                f"{where}: field {field!r} names the unknown {str(name)[:40]!r}; {nearest(str(name), names)}"
            )
        _choice(policy, where, f"{field}.{name}", POLICIES)
    rest = str(value.get(OTHERS) or otherwise)
    return {name: str(value.get(name) or rest) for name in known}


# The packaged patterns. Each is linear in the text: a run of characters is tried from its start alone, parts of it are
# bounded, and what an expression cannot say is checked on the match.


def _taken(text: str, start: int, count: int, end: int) -> int:
    """Where so many letters and digits end that begin at ``start``; 0 where there are fewer, or one more follows."""
    for at in range(start, end):
        count -= text[at].isalnum()
        if not count:
            return 0 if text[at + 1 : at + 2].isalnum() else at + 1
    return 0


_IBAN_LENGTHS = {
    code[:2]: int(code[2:])
    for code in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
        "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
        "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
        "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
        "YE30"
    ).split()
}


def _iban(text: str, start: int, end: int) -> int:
    """ISO 13616: as long as its country says, and 1 modulo 97 once its first four characters stand last."""
    end = _taken(text, start, _IBAN_LENGTHS.get(text[start : start + 2].upper(), 0), end)
    plain = "".join(filter(str.isalnum, text[start:end]))
    return end if end and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1 else 0


def _card(text: str, start: int, end: int) -> int:
    """13 to 19 digits that pass Luhn's check (ISO/IEC 7812-1), as many as do."""
    for count in range(19, 12, -1):
        stop = _taken(text, start, count, end)
        digits = [int(c) for c in text[start:stop] if c.isdigit()]
        if stop and not sum(digits[-1::-2] + [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]) % 10:
            return stop
    return 0


def _address(text: str, start: int, end: int) -> int:
    """An IPv4 or IPv6 address; a colon behind it is the sentence's."""
    for stop in (end, end - 1) if text[end - 1] == ":" else (end,):
        found = text[start:stop]
        try:
            ipaddress.ip_address(re.sub(r"(^|\.)0+(?=[0-9])", r"\1", found) if ":" not in found else found)
        except ValueError:
            continue
        return stop if any(c.isalnum() for c in found) else 0
    return 0


_GAP = "[ \u00a0]?"
PATTERNS: dict[str, Pattern] = {
    "EMAIL": Pattern(
        re.compile(r"(?<![\w.%+-])[\w.%+-]++@(?:[^\W_][\w-]{0,62}\.){1,8}[^\W\d_][\w-]{0,61}[^\W_](?!\w)")
    ),
    "IBAN": Pattern(
        re.compile(rf"(?<![^\W_])[A-Za-z]{{2}}[0-9]{{2}}(?:{_GAP}[A-Za-z0-9]){{11,29}}"),
        _iban,
    ),
    "CARD": Pattern(re.compile("(?<![\\w.])[2-6](?:[ \u00a0-]?[0-9]){12,18}"), _card),
    "PHONE": Pattern(
        re.compile(
            r"""(?<![\w+.,/-])(?!\d\d?[-/.]\d\d?[-/.]\d\d)(?:
            (?:\+|00)[\ \u00a0]?[1-9](?:[\ \u00a0.()/-]{0,2}[0-9]){7,14}  # international
            | \(?0(?:[\ \u00a0()/-]{0,2}[0-9]){8,11}  # within a country, behind its 0
            | \([2-9][0-9]{2}\)\ ?[0-9]{3}[\ .-]?[0-9]{4} | [2-9][0-9]{2}[\ .-][0-9]{3}[\ .-][0-9]{4}  # North America
            )(?!\w|[.,/-][0-9])""",
            re.VERBOSE,
        )
    ),
    "IP": Pattern(
        re.compile(
            r"(?<![\w.:])(?:(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w]|\.[0-9])"
            r"|(?=[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{2,39}(?:[0-9]{0,3}(?:\.[0-9]{1,3}){3})?(?!\w))"
        ),
        _address,
    ),
}
