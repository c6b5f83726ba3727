"""Minimal pairs of ten phenomena of English, made by rule from lists of words.

The two sentences of a pair differ in some words, or in their order, and what is right in one pair is wrong in
another of the same group. So right and wrong sentences hold the same words, as often and in the same orders:
whoever prefers a word, or an order, to another whatever stands around them is right in one half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

PEOPLE = (
    "doctor", "teacher", "farmer", "nurse", "lawyer", "baker", "painter", "singer", "dancer", "soldier",
    "sailor", "driver", "writer", "banker", "butcher", "carpenter", "plumber", "gardener", "tailor", "hunter",
    "guard", "judge", "pilot", "clerk", "cook", "guest", "student", "pupil", "neighbor", "engineer",
    "author", "visitor", "stranger", "cousin", "friend", "prisoner", "captain", "coach", "miner", "barber",
)  # fmt: skip
"""People whose plural has an s; the first person of a pair is one of these in turn."""

THINGS = (
    "lamp", "key", "box", "chair", "table", "cup", "plate", "book", "letter", "map",
    "coat", "hat", "ring", "clock", "mirror", "window", "door", "picture", "basket", "bottle",
    "bag", "ladder", "hammer", "needle", "pencil", "ticket", "candle", "carpet", "blanket", "pillow",
    "bucket", "spoon", "bell", "drum", "wheel", "boat", "cart", "wagon", "tent", "rope",
)  # fmt: skip

ADJECTIVES = ("old", "new", "small", "large", "heavy", "dirty", "broken", "expensive")

TIMES = ("Yesterday", "Last week", "Last year", "This morning")

ACTIONS = (
    "sing", "work", "swim", "cook", "dance", "sleep", "write", "speak", "drive", "run",
    "read", "play", "sit", "stand", "wait", "walk", "eat", "drink", "talk", "smoke",
)  # fmt: skip
"""Verbs whose third person has an s."""

COUPLES = (
    ("man", "woman"), ("boy", "girl"), ("king", "queen"), ("uncle", "aunt"), ("father", "mother"),
    ("brother", "sister"), ("son", "daughter"), ("husband", "wife"), ("prince", "princess"),
    ("waiter", "waitress"), ("actor", "actress"), ("nephew", "niece"), ("grandfather", "grandmother"),
    ("monk", "nun"), ("duke", "duchess"), ("hero", "heroine"), ("groom", "bride"), ("wizard", "witch"),
    ("emperor", "empress"), ("grandson", "granddaughter"),
)  # fmt: skip

PLURALS = {"man": "men", "woman": "women", "wife": "wives", "hero": "heroes"}

TO_ONESELF = ("hurt", "saw", "blamed", "introduced", "admired", "defended", "washed", "taught", "helped")

IRREGULAR = (
    ("broke", "broken", "the cup"), ("bit", "bitten", "the dog"), ("chose", "chosen", "a hat"),
    ("did", "done", "the work"), ("drew", "drawn", "a map"), ("drank", "drunk", "the milk"),
    ("drove", "driven", "the truck"), ("ate", "eaten", "the bread"), ("flew", "flown", "the plane"),
    ("forgot", "forgotten", "the key"), ("forgave", "forgiven", "the thief"), ("froze", "frozen", "the meat"),
    ("gave", "given", "a speech"), ("grew", "grown", "a beard"), ("hid", "hidden", "the money"),
    ("knew", "known", "the answer"), ("rode", "ridden", "the horse"), ("rang", "rung", "the bell"),
    ("saw", "seen", "the movie"), ("shook", "shaken", "the bottle"), ("sang", "sung", "a song"),
    ("spoke", "spoken", "the truth"), ("stole", "stolen", "the ring"),
    ("swam", "swum", "a mile"), ("took", "taken", "the train"), ("tore", "torn", "the letter"),
    ("threw", "thrown", "the ball"), ("wore", "worn", "a coat"), ("wrote", "written", "a book"),
    ("began", "begun", "the work"), ("swore", "sworn", "an oath"), ("withdrew", "withdrawn", "the offer"),
    ("undertook", "undertaken", "the task"), ("overtook", "overtaken", "the bus"),
    ("woke", "woken", "the baby"), ("forbade", "forbidden", "the game"),
    ("overcame", "overcome", "the fear"), ("wove", "woven", "a carpet"),
    ("went", "gone", "to town"), ("fell", "fallen", "down"),
)  # fmt: skip
"""Past, participle, and what follows."""

WITH_PEOPLE = (
    "admired", "avoided", "envied", "greeted", "hired", "ignored", "injured", "praised", "punished",
    "rescued", "respected", "thanked", "trusted", "welcomed", "recognized", "insulted", "arrested",
    "appointed",
)  # fmt: skip

WITH_THINGS = (
    "carried", "described", "designed", "discovered", "emptied", "fixed", "found", "invented", "mended",
    "mentioned", "needed", "owned", "raised", "repaired", "replaced", "used", "valued", "wanted", "wrapped",
    "destroyed", "examined", "borrowed",
)  # fmt: skip
"""Verbs that need an object, of people and of things."""

ALONE = (
    "arrived", "vanished", "sneezed", "coughed", "yawned", "snored", "slept", "laughed", "smiled", "died",
    "disappeared", "blushed", "fainted", "hesitated", "listened", "waited", "complained", "shivered",
    "trembled", "lied",
)  # fmt: skip
"""Verbs that take no object."""

PRONOUNS = (("they", "them"), ("he", "him"), ("she", "her"), ("we", "us"), ("I", "me"))

DEEDS = ("thanked", "helped", "called", "invited", "followed", "visited", "warned", "saw")

ASKED = ("what", "why", "where", "when", "how")

KNOWN = ("Everybody knows", "Nobody knows", "The judge asked", "It is clear", "They told us", "We remember")

DONE = ("left", "slept", "worked", "waited", "spoken", "cried", "swum", "fallen")

Pair = tuple[str, str, str]
"""A group of pairs, the right sentence and the wrong one."""


def pair(group: str, sentence: str, right: str, wrong: str) -> Pair:
    """A sentence with what is right, and with what is wrong, in place of `{}`."""
    return group, sentence.format(right), sentence.format(wrong)


def agreement() -> Iterator[Pair]:
    """The verb agrees with the noun before it."""
    for number, person in enumerate(PEOPLE):
        verb, where = ACTIONS[number % len(ACTIONS)], ("here", "in town", "at home")[number % 3]
        yield pair(person, f"Every day the {person} {{}} {where}.", f"{verb}s", verb)
        yield pair(person, f"Every day the {plural(person)} {{}} {where}.", verb, f"{verb}s")


def agreement_across() -> Iterator[Pair]:
    """The verb agrees with a noun, and another of the other number stands between them."""
    for number, thing in enumerate(THINGS):
        other, adjective = THINGS[(number + 7) % len(THINGS)], ADJECTIVES[number % len(ADJECTIVES)]
        yield pair(thing, f"The {thing} near the {plural(other)} {{}} {adjective}.", "is", "are")
        yield pair(thing, f"The {plural(thing)} near the {other} {{}} {adjective}.", "are", "is")


def determiners() -> Iterator[Pair]:
    """The noun agrees with its demonstrative."""
    for number, thing in enumerate(THINGS):
        one, several = (("this", "these"), ("that", "those"))[number % 2]
        start = f"The {PEOPLE[number]} {('bought', 'found', 'sold', 'painted')[number % 4]}"
        yield pair(thing, f"{start} {one} {{}} in town.", thing, plural(thing))
        yield pair(thing, f"{start} {several} {{}} in town.", plural(thing), thing)


def reflexives() -> Iterator[Pair]:
    """A reflexive agrees with its noun, in gender or in number."""
    for number, (he, she) in enumerate(COUPLES):
        verb = TO_ONESELF[number % len(TO_ONESELF)]
        yield pair(f"gender {he}", f"The {he} {verb} {{}} in the end.", "himself", "herself")
        yield pair(f"gender {he}", f"The {she} {verb} {{}} in the end.", "herself", "himself")
        one, own = ((he, "himself"), (she, "herself"))[number % 2]
        yield pair(f"number {he}", f"The {one} {verb} {{}} in the end.", own, "themselves")
        yield pair(f"number {he}", f"The {plural(one)} {verb} {{}} in the end.", "themselves", own)


def negative_polarity() -> Iterator[Pair]:
    """`Ever` needs a negation in its clause."""
    for number, person in enumerate(PEOPLE):
        other = PEOPLE[(number + 11) % len(PEOPLE)]
        done = ("been here", "seen the sea", "read this book", "lost a game")[number % 4]
        for first, second, right in (("has ever", "has", ("no", "one")), ("has", "has ever", ("one", "no"))):
            sentence = f"It seems that {{}} {person} {first} {done}, but {{}} {other} {second} {done}."
            yield person, sentence.format(*right), sentence.format(*right[::-1])


def irregular_pasts() -> Iterator[Pair]:
    """Irregular verbs have one form for the past, and another after `has`."""
    for number, (past, participle, rest) in enumerate(IRREGULAR):
        person, time = PEOPLE[number], TIMES[number % len(TIMES)]
        yield pair(past, f"{time} the {person} {{}} {rest}.", past, participle)
        yield pair(past, f"By now the {person} has {{}} {rest}.", participle, past)


def objects() -> Iterator[tuple[str, str, str, str]]:
    """Verbs that need an object: a subject, the verb, an object, and the word that asks for it."""
    for number, verb in enumerate((*WITH_PEOPLE, *WITH_THINGS)):
        if verb in WITH_PEOPLE:
            yield PEOPLE[number], verb, f"the {PEOPLE[(number + 17) % len(PEOPLE)]}", "who"
        else:
            yield PEOPLE[number], verb, f"the {THINGS[number]}", "what"


def argument_structure() -> Iterator[Pair]:
    """Some verbs need an object, and others take none."""
    for number, (person, verb, thing, _) in enumerate(objects()):
        start, alone = f"{TIMES[number % len(TIMES)]} the {person}", ALONE[number % len(ALONE)]
        yield pair(verb, f"{start} {{}} {thing}.", verb, alone)
        yield pair(verb, f"{start} {{}} at the station.", alone, verb)


def filler_and_gap() -> Iterator[Pair]:
    """After a question word an object is missing; after `that` none is."""
    for number, (person, verb, thing, word) in enumerate(objects()):
        end = ("last week", "yesterday")[number % 2]
        yield pair(verb, f"Everybody knows {{}} the {person} {verb} {end}.", word, "that")
        yield pair(verb, f"Everybody knows {{}} the {person} {verb} {thing} {end}.", "that", word)


def pronoun_case() -> Iterator[Pair]:
    """Pronouns have one form as subjects, and another as objects."""
    for number, person in enumerate(PEOPLE):
        subject, thing = PRONOUNS[number % len(PRONOUNS)]
        deed, time = DEEDS[number % len(DEEDS)], TIMES[number % len(TIMES)]
        yield pair(person, f"{time} {{}} {deed} the {person}.", subject, thing)
        yield pair(person, f"{time} the {person} {deed} {{}} again.", thing, subject)


def question_order() -> Iterator[Pair]:
    """In a question the auxiliary stands before the subject; in one within a statement it stands behind."""
    for number, person in enumerate(PEOPLE):
        word, knows = ASKED[number % len(ASKED)], KNOWN[number % len(KNOWN)]
        participle = IRREGULAR[number % 23][1] if word == "what" else DONE[number % len(DONE)]
        orders = f"has the {person}", f"the {person} has"
        yield pair(person, f"{word.capitalize()} {{}} {participle}?", *orders)
        yield pair(person, f"{knows} {word} {{}} {participle}.", *orders[::-1])


PHENOMENA: dict[str, Callable[[], Iterator[Pair]]] = {
    "subject-verb agreement": agreement,
    "agreement across a noun": agreement_across,
    "determiner and noun": determiners,
    "reflexives": reflexives,
    "negative polarity": negative_polarity,
    "irregular pasts": irregular_pasts,
    "argument structure": argument_structure,
    "filler and gap": filler_and_gap,
    "pronoun case": pronoun_case,
    "question order": question_order,
}


def pairs() -> Iterator[dict[str, object]]:
    """All pairs as items of `probekit ask`; the right sentence stands first in every second one."""
    for kind, make in PHENOMENA.items():
        for number, (group, right, wrong) in enumerate(make()):
            answer = number // 2 % 2
            choices = [wrong, right] if answer else [right, wrong]
            yield {"kind": kind, "group": f"{kind}: {group}", "choices": choices, "answer": answer}


def plural(noun: str) -> str:
    """The plural of a noun of the lists."""
    return PLURALS.get(noun, f"{noun}es" if noun.endswith(("x", "ch", "s")) else f"{noun}s")
