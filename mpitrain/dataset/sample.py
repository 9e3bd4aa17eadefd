"""The bundled corpus, made from templates and invented names: the same bytes on every machine.

A third of every inventory is held out of the training split, so most names of dev and test are new and only
their context tells what they are. `python -m mpitrain.dataset.sample DIR` writes the three files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import TypeVar

SIZES = {"train": (4200, 0.0, 11), "dev": (600, 0.7, 12), "test": (600, 0.7, 13)}  # sentences, held-out share, seed

Item = TypeVar("Item")
TaggedWords = list[tuple[str, str]]


def _words(text: str) -> list[str]:
    return text.split()


def _templates(text: str) -> list[list[str]]:
    return [template.split() for template in text.replace("\n", " ").split("|")]


def _product(stems: str, endings: str) -> list[str]:
    """All joined names; the number of endings is no multiple of 3, so each ending is met in training."""
    return [stem + ending for stem in stems.split() for ending in endings.split()]


# So large that most names occur once. A few hundred names met often would become one word piece each, and the
# pieces of a new name would never have been trained.
ONSETS = "B Br C D Dr F G Gl H J K Kl L M N P R S Sk St T Tr V W"
STEMS = " ".join(_product(ONSETS, "al ar el en il im or on un ost ask ell"))
FIRST_NAMES = _product(
    "Al An Bel Cor Dar Ed El Fel Gr Har Il Jan Kar Lor Mar Nor Ol Pet Ros Sal Tam Ul Ver Wil Yor Zel",
    "a an ana eta i ia in ina is o on us ik",
)
COMMON_FIRST_NAMES = _words("""Anna Boris Carla David Elena Farid Greta Hugo Ines Jonas Karin Leo Maria Nadia Oscar
Jos\u00e9 Ren\u00e9 S\u00f8ren J\u00fcrgen""")
SURNAMES = _product(STEMS, "son wick man berg ley ovic ez strom ard inger")
PLACES = _product(STEMS, "ville burg ton ford haven dale port mouth field stad")
BRANDS = _product(STEMS, "tech soft dex via com gen lux")
ACRONYMS = _product("B D G K L M N P Q R S T V X Z", "BA CF DN FT GA KC LN MT NA PF")
AMBIGUOUS = _words("Washington Jordan Paris Sydney Lincoln Chelsea Florence Austin Hamilton Victoria Madison Houston")
FIELDS = _words("Health Energy Transport Finance Justice Labour Defence Culture Education Trade Housing Science")

FILL = {
    "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": _words("January February March April May June July August September October November December"),
    "number": _words("two three four five seven nine eleven twelve 15 18 20 24 37 48 60 85 120 300"),
    "score": _words("1-0 2-0 2-1 3-1 3-2 4-0 0-0 1-1 5-2 78-71 102-99 6-4"),
    "percent": _words("1.5 2 2.8 3.1 4 5.5 6 7.2 9 11 12.4 17"),
    "year": _words("1987 1994 2003 2009 2012 2016 2018 2019 2021 2023 2024"),
    "role": _words("minister mayor coach director spokeswoman lawyer driver striker singer senator teacher banker"),
    "thing": _words("bridge report film budget contract festival museum school vaccine tunnel album game law strike"),
    "adjective": _words("new quiet surprising long cheap small difficult great modest terrible record bitter"),
    "verb": _words("praised criticised rejected welcomed questioned defended explained postponed"),
    "feel": _words("love miss hate want need"),
    "noise": _words("lol omg haha ugh wow hmm #mood #monday :) !! <3 smh"),
}  # fmt: skip

LEADS = _templates("""On <day> ,|In <month> ,|According to {PER} ,|In {LOC} ,|Last week ,|Near {LOC} ,|
After <number> years at {ORG} ,|Meanwhile ,|For the first time since <year> ,|Speaking in {LOC} on <day> ,|
As a <role> at {ORG} ,|Despite the <adjective> <thing> ,""")
TAILS = _templates("""in {LOC}|after talks with {ORG}|, {PER} said|, according to {ORG}|near the border with {LOC}|
on <day>|, a spokeswoman for {ORG} told reporters|, wrote {PER} in a letter to {ORG}|before flying home to {LOC}|
since <year>|, said {FULL} , who lives in {LOC}|despite protests in {LOC} and {LOC}|while {LAST} was waiting outside|
because the <thing> was too <adjective>|, but {LAST} did not reply|, the <role> of {LOC} said""")
NEWS = _templates("""<role> {FULL} <verb> the <adjective> <thing>|{PER} was born in {LOC} in <year>|
police in {LOC} arrested <number> people|the government of {LOC} <verb> the <thing>|
a <adjective> storm hit {LOC} and the coast of {LOC}|{PER} , <number> , <verb> the <thing>|
{LOC} <role> {FULL} <verb> a <thing>|voters in {LOC} elected {FULL} as their <role>|
{PER} and {PER} <verb> each other 's <thing>|the train from {LOC} to {LOC} was <number> hours late|
{ORG} <verb> the <thing> of {ORG}|students of {ORG} met {PER}|<number> houses in {LOC} lost power|
Dr. {LAST} works as a <role> for {ORG}|Mr. {LAST} <verb> the <adjective> <thing>|
Mrs. {LAST} moved from {LOC} to {LOC}|a court in {LOC} ordered {ORG} to pay $ <number> million|
the <role> of {ORG} , {FULL} , resigned|the <adjective> <thing> cost $ <number> million|no one was hurt|
the road to {LOC} stays closed until <day>|researchers at {ORG} found a <adjective> <thing>|
{PER} 's mother still lives in {LOC}|hotels in {LOC} are <adjective> in <month>""")
SPORTS = _templates("""{CLUB} beat {CLUB} <score>|{CLUB} lost <score> to {CLUB}|
{PER} scored twice as {CLUB} won <score>|{CLUB} signed {FULL} from {CLUB}|{CLUB} coach {FULL} <verb> the referee|
striker {LAST} missed a penalty for {CLUB}|fans of {CLUB} travelled to {LOC}|
{PER} ( {LOC} ) beat {PER} ( {LOC} ) <score>|{PER} won the race in {LOC} ahead of {PER}|
the match in {LOC} ended <score>|{CLUB} drew <score> with {CLUB} at home|
goalkeeper {FULL} will leave {CLUB} in <month>|the team trained for <number> hours""")
BUSINESS = _templates("""shares of {ORG} fell <percent> %|{ORG} bought {ORG} for $ <number> million|
{ORG} shares rose <percent> % to <number> euros|{ORG} opened a <adjective> plant in {LOC}|
{FULL} , chief executive of {ORG} , <verb> the <thing>|{ORG} hired {FULL} as finance director|
profits at {ORG} grew by <percent> %|analyst {FULL} of {ORG} <verb> the forecast|
{ORG} will cut <number> jobs in {LOC}|exports from {LOC} rose <percent> %|
{ORG} and {ORG} will build a <thing> in {LOC}|oil prices rose <percent> % in <month>""")
CHAT = _templates("""<noise> {FIRST} is so funny|anyone been to {LOC} ? need a hotel there|
my phone from {ORG} died again <noise>|i <feel> living in {LOC} <noise>|just saw {PER} at the gym <noise>|
happy birthday {FIRST} <noise>|why is {ORG} support so slow ?|call me later ok ?|
thanks {FIRST} see you in {LOC} on <day>|stuck in traffic near {LOC} again <noise>|come on {CLUB} win this <noise>|
dont buy shares of {ORG} <noise>|{FIRST} told {FIRST} to bring pizza|i <feel> coffee|
watching {CLUB} vs {CLUB} with {FIRST} <noise>""")
LISTS = _templates("""# <number> : {FULL} , {LOC}|<number> . {CLUB} <number> points|
results : {CLUB} <score> {CLUB} ; {CLUB} <score> {CLUB}|guests : {FULL} , {FULL} and {FULL}|
flights to : {LOC} , {LOC} , {LOC} , {LOC} and {LOC}|members : {LONGORG} , {LONGORG} and {LONGORG}|
cast : {FULL} ( <role> ) , {FULL} ( <role> )|weather : {LOC} <number> degrees , {LOC} <number> degrees|
page <number> of <number>""")
TITLES = _templates("""{LOC} <role> {LAST} to resign|{CLUB} fire coach {LAST}|{ORG} to cut <number> jobs|
Interview with {FULL}|Storm over {LOC}|How {FULL} built {ORG}|Letter from {LOC}|A <adjective> <thing>|
{LAST} : ' We need a <thing> '|Opinion by {FULL}""")


class Writer:
    """Writes the sentences of one split.

    Only `Random.random` is used: Python promises its sequence for a seed, and promises nothing for `choice`.
    """

    def __init__(self, seed: int, held_out_share: float) -> None:
        self._random = Random(seed).random
        self._held_out_share = held_out_share

    def chance(self, share: float) -> bool:
        """True in that share of the calls."""
        return self._random() < share

    def pick(self, items: list[Item]) -> Item:
        """Any of the items."""
        return items[int(self._random() * len(items))]

    def name(self, items: list[str]) -> str:
        """An item of the training part of an inventory, or of the held-out third."""
        place = int(self._random() * (len(items) // 3))
        return items[3 * place if self.chance(self._held_out_share) else 3 * place + 1 + int(self.chance(0.5))]

    def person(self, form: str) -> str:
        """A person's name: `FULL` has a first name, `LAST` is a surname only, `PER` any of these."""
        last = self.name(SURNAMES)
        first = self.pick(COMMON_FIRST_NAMES) if self.chance(0.3) else self.name(FIRST_NAMES)
        if form == "PER":
            form = self.pick(["FULL", "FULL", "FULL", "LAST", "INITIAL", "FIRST"])
        if form in ("LAST", "FIRST") and self.chance(0.08):
            return self.pick(AMBIGUOUS)
        return {"FULL": f"{first} {last}", "LAST": last, "FIRST": first, "INITIAL": f"{first[0]}. {last}"}[form]

    def place(self, form: str) -> str:
        """A place: one word, a compound, or a word that also names people and clubs."""
        if self.chance(0.1):
            return self.pick(AMBIGUOUS)
        name = self.name(PLACES)
        compounds = ["Port {}", "Lake {}", "New {}", "{} County", "{} Valley", "Saint {}"]
        return self.pick(compounds).format(name) if self.chance(0.18) else name

    def organisation(self, form: str) -> str:
        """A company, club, ministry, university or paper; `LONGORG` says by its words that it is one."""
        place, last, brand = self.name(PLACES), self.name(SURNAMES), self.name(BRANDS)
        if form == "CLUB":
            club = ["{}", "{}", "{} United", "{} City", "{} Rovers", "FC {}", "{} Athletic"]
            return self.pick(club).format(self.pick(AMBIGUOUS) if self.chance(0.15) else place)
        if form == "ORG" and self.chance(0.45):
            return brand if self.chance(0.7) else self.name(ACRONYMS)
        field = self.pick(FIELDS)
        return self.pick(
            [f"University of {place}", f"Ministry of {field}", f"{place} Herald", f"{last} & Sons", f"Bank of {place}",
             f"{brand} Corp", f"{last} Group", f"{place} {field} Council", f"{brand} Airlines", f"{place} Police"]
        )  # fmt: skip

    def fill(self, template: list[str]) -> TaggedWords:
        """The template with names and words in place of its slots."""
        words: TaggedWords = []
        for piece in template:
            opening, slot, closing = piece[0], piece[1:-1], piece[-1]
            if opening + closing == "{}":
                label = KINDS[slot][0]
                name = KINDS[slot][1](self, slot).split()
                words += [(word, f"{'I' if place else 'B'}-{label}") for place, word in enumerate(name)]
            elif opening + closing == "<>":
                words += [(word, "O") for word in self.pick(FILL[slot]).split()]
            else:
                words.append((piece, "O"))
        return words

    def prose(self, cores: list[list[str]]) -> TaggedWords:
        """One or two statements with an opening, an ending, a capital and a full stop."""
        words = self.fill(self.pick(LEADS)) if self.chance(0.25) else []
        words += self.fill(self.pick(cores))
        if self.chance(0.12):
            words += [(self.pick(["and", "but", ";", "while"]), "O"), *self.fill(self.pick(cores))]
        if self.chance(0.4):
            words += self.fill(self.pick(TAILS))
        first, tag = words[0]
        return [(first[0].upper() + first[1:], tag), *words[1:], (".", "O")]

    def sentence(self) -> TaggedWords:
        """A sentence of any style."""
        style = self._random()
        if style < 0.7:
            return self.prose(NEWS if style < 0.36 else SPORTS if style < 0.54 else BUSINESS)
        if style < 0.86:
            return [(word.lower(), tag) for word, tag in self.fill(self.pick(CHAT))]
        if style < 0.92:
            return self.fill(self.pick(LISTS))
        words = self.fill(self.pick(TITLES))
        return [(word.upper(), tag) for word, tag in words] if self.chance(0.2) else words


KINDS = {
    **dict.fromkeys(["PER", "FULL", "LAST", "FIRST"], ("PER", Writer.person)),
    **dict.fromkeys(["ORG", "LONGORG", "CLUB"], ("ORG", Writer.organisation)),
    "LOC": ("LOC", Writer.place),
}


def write_sample(directory: Path) -> None:
    """Write `train.conll`, `dev.conll` and `test.conll`: word TAB tag (IOB2), an empty line after each sentence."""
    met: set[str] = set()  # no sentence stands twice in the corpus, so dev and test share none with train
    directory.mkdir(parents=True, exist_ok=True)
    for split, (num_sentences, held_out_share, seed) in SIZES.items():
        writer, texts = Writer(seed, held_out_share), list[str]()
        while len(texts) < num_sentences:
            words = writer.sentence()
            text = "".join(f"{word}\t{tag}\n" for word, tag in words)
            if 3 <= len(words) <= 45 and text not in met:
                met.add(text)
                texts.append(text)
        (directory / f"{split}.conll").write_text("\n".join(texts), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))
