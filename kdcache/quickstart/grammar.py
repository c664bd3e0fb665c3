"""A made-up language pair, Brask to Olua, from a small grammar.

Brask puts subject, verb, object; marks case on nouns, gender and number on adjectives before
them; and writes compounds as one word. Olua puts the verb first, agrees it with the class of a
subject that comes later, puts adjectives behind with a class prefix, uses prepositions, marks
animate objects, closes negation around the verb and says compounds the other way round.

A third of its words have synonyms. Which one is right depends on the sentence (who acts, which
adjective stands by, which tense), mostly but not always, so a teacher's distribution over the
words says more than the one word of a reference. Some Brask words have two meanings that the
rest of the sentence tells apart, or does not.

Every choice is a keyed hash: the same corpus on every machine and under every library version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from kdcache.formats.keyed import text_key

Item = TypeVar("Item")

# meaning: gender in Brask, class in Olua, is it animate
NOUNS = {
    "fisher": "0a+", "child": "1a+", "miller": "0a+", "queen": "1c+", "guard": "0b+",
    "singer": "1a+", "stranger": "2a+", "weaver": "1b+", "goat": "1b+", "horse": "0b+",
    "crow": "2b+", "wolf": "0b+", "bear": "2c+", "bee": "1c+", "boat": "1c-", "river": "0c-",
    "stone": "2c-", "bread": "2a-", "house": "2b-", "tower": "0b-", "lamp": "1a-", "rope": "0a-",
    "song": "1c-", "letter": "0a-", "field": "2b-", "apple": "1a-", "knife": "0b-",
    "cloak": "0c-", "bridge": "1b-", "forest": "0c-", "market": "2c-", "well": "2a-", "coin": "1b-",
    "mirror": "0c-", "winter": "0a-", "storm": "1c-", "salt": "2a-", "iron": "2b-", "wool": "1a-",
    "gate": "0b-",
}  # fmt: skip
PLACES = ("river", "house", "tower", "field", "bridge", "forest", "market", "well", "gate")
MATERIALS = (
    "stone",
    "iron",
    "wool",
    "salt",
    "river",
    "winter",
    "house",
    "forest",
    "storm",
    "horse",
)
TRANSITIVE = (
    "see", "carry", "find", "hold", "buy", "break", "hide", "love", "fear", "wash", "follow",
    "paint", "lose", "want", "sell", "guard",
)  # fmt: skip
INTRANSITIVE = ("sleep", "sing", "fall", "wait", "run", "weep", "return", "vanish")
GIVING = ("give", "show", "bring", "send", "promise")
ADJECTIVES = (
    "old", "small", "red", "heavy", "quiet", "broken", "bright", "cold", "proud", "hungry", "deep",
    "strange", "young", "golden",
)  # fmt: skip
TIMES = ("today", "yesterday", "often", "never", "again", "soon", "at_night", "in_spring")
NUMBERS = ("two", "three", "seven")
# Two meanings of one Brask word.
HOMOGRAPHS = {"letter": "field", "guard": "wait", "coin": "bee", "deep": "cold", "lamp": "crow"}
# Meanings with a second word in Olua, and what makes it likely.
SYNONYMS = {
    "see": "animate", "carry": "plural", "find": "past", "love": "animate", "want": "past",
    "sleep": "plural", "fall": "past", "give": "plural", "send": "animate", "follow": "animate",
    "old": "animate", "small": "plural", "bright": "past", "heavy": "plural", "strange": "animate",
    "boat": "adjective", "stone": "adjective", "child": "adjective", "house": "plural",
    "river": "past", "song": "past", "stranger": "adjective", "wolf": "plural",
    "tower": "adjective", "today": "negative", "often": "negative", "again": "past",
    "soon": "animate",
}  # fmt: skip
SYNONYM_IF, SYNONYM_ELSE = 0.85, 0.2  # probability of the second word


class Dice:
    """Numbers that follow from a key and from how many were drawn before."""

    def __init__(self, *key: object) -> None:
        """Start at the first number of a key."""
        self._key = key
        self._drawn = 0

    def number(self) -> float:
        """Uniform in [0, 1)."""
        self._drawn += 1
        return text_key(*self._key, self._drawn) / 2**64

    def chance(self, probability: float) -> bool:
        """Heads, with this probability."""
        return self.number() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """One item, all equally likely."""
        return items[int(self.number() * len(items))]

    def frequent(self, items: Sequence[Item]) -> Item:
        """One item, earlier ones more often, as words of a language are."""
        return items[int(self.number() ** 1.7 * len(items))]


def _word(dice: Dice, onsets: str, nuclei: str, codas: str, syllables: int) -> str:
    """A word of some syllables."""
    parts = [dice.pick(onsets.split(",")) + dice.pick(nuclei.split(",")) for _ in range(syllables)]
    return "".join(parts) + dice.pick(codas.split(","))


@cache
def lexicon() -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Brask word and the two Olua words (the same one twice without a synonym) of a meaning."""
    groups = (NOUNS, TRANSITIVE, INTRANSITIVE, GIVING, ADJECTIVES, TIMES, NUMBERS)
    meanings = list(dict.fromkeys(word for group in groups for word in group))
    brask: dict[str, str] = {}
    olua: dict[str, tuple[str, str]] = {}
    seen: set[str] = set()

    def fresh(language: str, meaning: str) -> str:
        dice = Dice("lexicon", language, meaning)
        while True:
            if language == "brask":
                onsets, codas = "b,br,d,f,g,gr,h,k,kl,l,m,n,r,s,sk,st,t,v", "n,r,l,sk,st,k,m,ft"
                word = _word(dice, onsets, "a,e,i,o,u,ei", codas, 1 + dice.chance(0.6))
            else:
                onsets = "h,k,l,m,n,p,r,t,w,y,ch"
                word = _word(dice, onsets, "a,e,i,o,u,aa,ai,ua", ",", 2 + dice.chance(0.4))
            if word not in seen:
                seen.add(word)
                return word

    for meaning in meanings:
        brask[meaning] = fresh("brask", meaning)
        first = fresh("olua", meaning)
        second = fresh("olua", f"{meaning} again") if meaning in SYNONYMS else first
        olua[meaning] = (first, second)
    for meaning, other in HOMOGRAPHS.items():
        brask[meaning] = brask[other]
    return brask, olua


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: what it means, before either language has said it."""

    noun: str
    plural: bool
    adjectives: tuple[str, ...]
    modifier: str | None
    number: str | None

    @property
    def animate(self) -> bool:
        """Whether it can act."""
        return NOUNS[self.noun][2] == "+"


@dataclass(frozen=True)
class Clause:
    """A clause: who does what to whom, where, when, and is it so."""

    subject: Phrase
    verb: str
    object: Phrase | None
    receiver: Phrase | None
    place: Phrase | None
    time: str | None
    tense: str
    negative: bool
    because: Clause | None


def _phrase(dice: Dice, nouns: Sequence[str], richness: float) -> Phrase:
    noun = dice.frequent(nouns)
    compound = dice.frequent(MATERIALS) if dice.chance(0.15 * richness) else None
    number = dice.pick(NUMBERS) if dice.chance(0.08 * richness) else None
    count = sum(dice.chance(0.24 * richness) for _ in range(2))
    adjectives = tuple(dict.fromkeys(dice.frequent(ADJECTIVES) for _ in range(count)))
    plural = number is not None or dice.chance(0.3)
    return Phrase(noun, plural, adjectives, None if compound == noun else compound, number)


def _clause(dice: Dice, depth: int = 0) -> Clause:
    animate = [noun for noun, kind in NOUNS.items() if kind[2] == "+"]
    richness = 1.0 if depth == 0 else 0.5
    subject = _phrase(dice, animate if dice.chance(0.85) else list(NOUNS), richness)
    shape = dice.number()
    thing = receiver = None
    if shape < 0.62:
        verb, thing = dice.frequent(TRANSITIVE), _phrase(dice, list(NOUNS), richness)
    elif shape < 0.86:
        verb = dice.frequent(INTRANSITIVE)
    else:
        verb, thing = dice.frequent(GIVING), _phrase(dice, list(NOUNS)[14:], richness)
        receiver = _phrase(dice, animate, 0.4)
    place = _phrase(dice, PLACES, 0.5) if dice.chance(0.25 if receiver is None else 0.1) else None
    time = dice.frequent(TIMES) if depth == 0 and dice.chance(0.35) else None
    tense = dice.pick(("past", "present", "present", "future"))
    negative = dice.chance(0.15)
    because = _clause(dice, 1) if depth == 0 and dice.chance(0.08) else None
    return Clause(subject, verb, thing, receiver, place, time, tense, negative, because)


CASES = {"subject": "", "object": "en", "receiver": "ur", "place": "ost"}


def _brask_phrase(phrase: Phrase, role: str) -> list[str]:
    words, _ = lexicon()
    gender = "aoe"[int(NOUNS[phrase.noun][0])]
    noun = words[phrase.noun]
    if phrase.modifier is not None:
        noun = f"{words[phrase.modifier]}s{noun}"
    plural = "i" if phrase.plural else ""
    number = [words[phrase.number]] if phrase.number else []
    adjectives = [words[adjective] + gender + plural for adjective in phrase.adjectives]
    return [*number, *adjectives, noun + plural + CASES[role]]


def brask(clause: Clause, subordinate: bool = False) -> list[str]:
    """Words of a clause in Brask: the verb second, or last in a subordinate clause."""
    words, _ = lexicon()
    prefix = {"past": "", "present": "", "future": "za"}[clause.tense]
    ending = ("d" if clause.tense == "past" else "") + ("unt" if clause.subject.plural else "it")
    verb = [*(["ni"] if clause.negative else []), prefix + words[clause.verb] + ending]
    said = _brask_phrase(clause.subject, "subject")
    rest: list[str] = []
    for role in ("receiver", "object", "place"):
        phrase = getattr(clause, role)
        if phrase is not None:
            rest += _brask_phrase(phrase, role)
    said += [*rest, *verb] if subordinate else [*verb, *rest]
    if clause.time is not None:
        said.append(words[clause.time])
    if clause.because is not None:
        said += [",", "dan", *brask(clause.because, subordinate=True)]
    return said


ARTICLES = {"a": ("ta", "tari"), "b": ("no", "nori"), "c": ("e", "eri")}
CONCORD = {"a": "t", "b": "n", "c": "y"}
TENSES = {"past": "mo", "present": "", "future": "ke"}


class Olua:
    """Says clauses in Olua; the dice choose among synonyms."""

    def __init__(self, dice: Dice) -> None:
        """Start a sentence."""
        self._dice = dice

    def _choose(self, meaning: str, clause: Clause, near: Phrase) -> str:
        """The word for a meaning: its context makes the second one likely, or unlikely."""
        _, words = lexicon()
        holds = {
            "animate": clause.subject.animate if clause.object is None else clause.object.animate,
            "plural": near.plural,
            "past": clause.tense == "past",
            "adjective": bool(near.adjectives),
            "negative": clause.negative,
        }
        if meaning not in SYNONYMS:
            return words[meaning][0]
        second = self._dice.chance(SYNONYM_IF if holds[SYNONYMS[meaning]] else SYNONYM_ELSE)
        return words[meaning][second]

    def _phrase(self, phrase: Phrase, clause: Clause) -> list[str]:
        kind = NOUNS[phrase.noun][1]
        said = [ARTICLES[kind][phrase.plural]]
        said.append(self._choose(phrase.noun, clause, phrase))
        if phrase.modifier is not None:
            said += ["o", self._choose(phrase.modifier, clause, phrase)]
        for adjective in phrase.adjectives:
            said.append(CONCORD[kind] + self._choose(adjective, clause, phrase))
        if phrase.number is not None:
            said.append(self._choose(phrase.number, clause, phrase))
        return said

    def clause(self, clause: Clause) -> list[str]:
        """Words of a clause: time, verb, subject, receiver, object, place, reason."""
        near = clause.subject
        said = [] if clause.time is None else [self._choose(clause.time, clause, near)]
        agreement = CONCORD[NOUNS[near.noun][1]] + ("i" if near.plural else "a")
        verb = agreement + self._choose(clause.verb, clause, near) + TENSES[clause.tense]
        said += ["na", verb, "hu"] if clause.negative else [verb]
        said += self._phrase(near, clause)
        if clause.receiver is not None:
            said += ["mi", *self._phrase(clause.receiver, clause)]
        if clause.object is not None:
            marker = ["ka"] if clause.object.animate else []
            said += [*marker, *self._phrase(clause.object, clause)]
        if clause.place is not None:
            on = "su" if clause.place.noun in ("bridge", "tower", "gate") else "lo"
            said += [on, *self._phrase(clause.place, clause)]
        if clause.because is not None:
            said += [",", "wen", *self.clause(clause.because)]
        return said


def _sentence(words: Sequence[str]) -> str:
    return " ".join(words).replace(" ,", ",") + "."


def sentence_pair(seed: int, number: int) -> tuple[str, str]:
    """Sentence `number` of a seed, in Brask and in Olua."""
    clause = _clause(Dice("clause", seed, number))
    return (
        _sentence(brask(clause)),
        _sentence(Olua(Dice("synonyms", seed, number)).clause(clause)),
    )


def corpus(sizes: dict[str, int], seed: int = 1) -> dict[str, list[tuple[str, str]]]:
    """Splits of distinct sentence pairs: no source sentence stands in two, or twice in one.

    Args:
        sizes: pairs per split, filled in order.
        seed: another seed gives other sentences of the same language.
    """
    seen: set[str] = set()
    splits: dict[str, list[tuple[str, str]]] = {}
    number = 0
    for split, size in sizes.items():
        pairs = splits.setdefault(split, [])
        while len(pairs) < size:
            src, tgt = sentence_pair(seed, number)
            number += 1
            if src not in seen:
                seen.add(src)
                pairs.append((src, tgt))
    return splits
