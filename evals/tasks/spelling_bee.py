"""Generated tasks of nanochat: how often a letter occurs in a word (SpellingBee), and spelling words (SimpleSpelling).

    bee = SpellingBee(read_words("words_alpha.txt"), 256, "test")  # the task evaluated in ChatCORE
    SimpleSpelling(words, 200_000)[7].conversation()

Given nanochat's list of words, `words_alpha.txt` of https://github.com/dwyl/english-words, question i is about the
word and letter of nanochat's, because they are drawn in the same order from the same seed. The sentences around them
are our own: 51 questions and the wording of the answer.
"""

import random
import string
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, overload

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.texts import text_dataset

from .gsm8k import Gsm8kQuestion
from .match import MatchQuestion
from .question import Question

Split = Literal["train", "test"]

FIRST_TEST_SEED = 10_000_000  # not negative seeds: Random(-n) is Random(n)
FROM_WORD, LOWER_CASE, QUESTION_MARK = 0.9, 0.3, 0.5
QUESTIONS = (
    "How often does {letter} occur in {word}",
    "How often does the letter {letter} occur in the word {word}",
    "How often do you see {letter} in {word}",
    "How often is the letter {letter} used in {word}",
    "How many times do I write {letter} when I write {word}",
    "How many times do you find {letter} in {word}",
    "How many times does the word {word} use the letter {letter}",
    "How many of the letters in {word} are {letter}",
    "How many {letter} can you find in {word}",
    "How many {letter} do you see in the word {word}",
    "How many {letter} do I need to spell {word}",
    "How many {letter} does it take to write {word}",
    "How many {letter} has the word {word}",
    "How many letters of {word} equal {letter}",
    "Please count the letter {letter} in {word}",
    "Please count every {letter} in the word {word}",
    "Count each {letter} in the word {word}",
    "Count how often {letter} occurs in {word}",
    "Count the letters {letter} of the word {word}",
    "For the word {word}, count the letter {letter}",
    "For {word}, tell me how often {letter} occurs",
    "Look at the word {word} and count {letter}",
    "Spell {word} and count the letter {letter}",
    "Go through {word} and count each {letter}",
    "Tell me how often the letter {letter} is in {word}",
    "Work out how many {letter} there are in {word}",
    "I want to know how many {letter} are in {word}",
    "Do you know how many {letter} there are in {word}",
    "When I spell {word}, how many {letter} do I need",
    "{word}: how many {letter}",
    # Spanish
    "¿Cuántas {letter} ves en la palabra {word}",
    "¿Cuántas veces está la letra {letter} en {word}",
    "Dime cuántas {letter} hay en la palabra {word}",
    "¿Con cuántas {letter} se escribe {word}",
    # Chinese
    "单词{word}里一共有几个字母{letter}",
    "请数一数{word}里的字母{letter}",
    "{letter}在{word}中出现了几次",
    "字母{letter}在单词{word}里出现多少次",
    # Korean
    "{word}에 글자 {letter}는 모두 몇 개입니까",
    "단어 {word}에서 {letter}를 세어 주세요",
    "{word}에는 {letter}가 몇 번 들어 있나요",
    "{word}를 쓰려면 {letter}가 몇 개 필요한가요",
    # French
    "Combien de fois trouve-t-on {letter} dans le mot {word}",
    "Combien y a-t-il de {letter} dans {word}",
    "Compte chaque lettre {letter} du mot {word}",
    # German
    "Wie viele {letter} hat das Wort {word}",
    "Wie oft steht der Buchstabe {letter} in {word}",
    "Zähle jedes {letter} im Wort {word}",
    # Japanese
    "{word}という単語に{letter}はいくつありますか",
    "{word}には文字{letter}が何回使われていますか",
    "{word}の{letter}を数えてください",
)


class SpellingBeeQuestion(Gsm8kQuestion):
    """A word and a letter to count in it; the answer counts by hand, then with the python tool. Graded as GSM8K."""

    name = "spelling_bee"


class SpellingQuestion(MatchQuestion):
    """A word to spell, as `lamp:l,a,m,p`."""

    name = "simple_spelling"

    def conversation(self) -> list[dict]:
        (letters,) = self.answers
        return [*self.messages, {"role": "assistant", "content": f"{letters.replace(',', '')}:{letters}"}]


class Generated(Sequence[Question]):
    """Questions that are made when they are read; question i depends on nothing but i, the split and the words.

    Args:
        words: See [`read_words`].
        size: Number of questions, at most 10 million.
        split: No question of `test` has the seed of one of `train`.
    """

    def __init__(self, words: Sequence[str], size: int, split: Split = "train"):
        self.words, self.size, self.split = words, size, split

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Question: ...

    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...

    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        chosen = range(self.size)[index]
        return self.question(self.rng(chosen)) if isinstance(chosen, int) else [self[i] for i in chosen]

    def rng(self, index: int) -> random.Random:
        return random.Random(index if self.split == "train" else FIRST_TEST_SEED + index)

    @abstractmethod
    def question(self, rng: random.Random) -> Question:
        """Draw a question."""


class SpellingBee(Generated):
    """Questions about the letters of words."""

    def question(self, rng: random.Random) -> SpellingBeeQuestion:
        word = rng.choice(self.words)
        letter = rng.choice(word) if rng.random() < FROM_WORD else rng.choice(string.ascii_lowercase)
        template = rng.choice(QUESTIONS)
        template = template.lower() if rng.random() < LOWER_CASE else template
        text = template.format(letter=quoted(letter, rng), word=quoted(word, rng))
        text += "?" if rng.random() < QUESTION_MARK else ""
        return SpellingBeeQuestion(text, [], worked_answer(word, letter))


class SimpleSpelling(Generated):
    """Words to spell, in another order than those of [`SpellingBee`]."""

    def __init__(self, words: Sequence[str], size: int, split: Split = "train"):
        words = list(words)
        random.Random(42).shuffle(words)
        super().__init__(words, size, split)

    def question(self, rng: random.Random) -> SpellingQuestion:
        word = rng.choice(self.words)
        return SpellingQuestion(f"Spell the word: {word}", [], (",".join(word),), ())


def quoted(text: str, rng: random.Random) -> str:
    quote = rng.choice(("", "'", '"'))
    return f"{quote}{text}{quote}"


def worked_answer(word: str, letter: str) -> str:
    """Return the answer in GSM8K's format.

    There is no space between `:` and a letter: with one it would be another token than in the spelled word.
    """
    lines, count = [], 0
    for place, each in enumerate(word, start=1):
        count += each == letter
        lines.append(f"{place}:{each}" + (f" hit! count={count}" if each == letter else ""))
    counted = "\n".join(lines)
    return (
        f"How many times does the letter '{letter}' occur in the word '{word}'? I spell the word and count.\n\n"
        f"The letters are\n{word}:{','.join(word)}\n\nNow I look for '{letter}':\n{counted}\n\nBy hand I find {count}."
        f"\n\nPython can check that:\n\n<<'{word}'.count('{letter}')={count}>>"
        f"\n\nPython finds {count}, so the answer is\n\n#### {count}"
    )


def read_words(source: str) -> list[str]:
    """Return the words of a text file or data set, separated by white space, in their order.

    Raises:
        UserError: The source is missing or holds something else than words of the letters a to z.
    """
    words = " ".join(text for text in text_dataset([source], what="words")["text"] if text).split()
    for word in words:
        if not (word.isascii() and word.islower() and word.isalpha()):
            raise UserError(f"words: {source}: {word!r} is no word of the letters a to z; take it out of the list")
    return words
