"""The texts that tokenizers are compared on: five short samples, an excerpt of a corpus, your own files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modeling_nanochat.errors import UserError
from modeling_nanochat.text.sources import first_line
from modeling_nanochat.text.texts import text_source
from modeling_nanochat.tokenization_nanochat import whole_characters

SAMPLES = ("news", "korean", "code", "math", "science")  # the rows of the original's table
SEED = 0  # a corpus may be sorted by source
FOLDER = Path(__file__).parent / "sample_texts"


@dataclass(frozen=True)
class Text:
    """Documents, encoded one by one; `name` is their row in the table."""

    name: str
    documents: list[str]
    source: str

    @property
    def bytes(self) -> int:
        return sum(len(document.encode()) for document in self.documents)

    @property
    def words(self) -> int:
        """Number of whitespace-separated words."""
        return sum(len(document.split()) for document in self.documents)


def sample_texts() -> list[Text]:
    """Return the texts that come with this package, written for it."""
    return [Text(name, [read_text(FOLDER / f"{name}.txt")], f"sample_texts/{name}.txt") for name in SAMPLES]


def given_text(argument: str) -> Text:
    """Return the text of a `name=file` argument.

    Raises:
        UserError: The argument has another form, or the file is missing, empty or not UTF-8.
    """
    name, equals, path = argument.partition("=")
    if not (name and equals and path):
        raise UserError(f"texts: {argument!r} is not of the form name=file; write for example poems=poems.txt")
    return Text(name, [read_text(Path(path))], path)


def read_text(path: Path) -> str:
    try:
        text = path.expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from error
    if not text.strip():
        raise UserError(f"{path}: no text in it; fill it or remove it")
    return text


def corpus_text(name: str, files: Sequence[str], max_bytes: int) -> Text:
    """Return documents of `files` (or a Hub dataset), shuffled by a fixed seed, up to the one that fills `max_bytes`.

    Of a stream it takes the first documents, to avoid reading all of it.

    Raises:
        UserError: The files cannot be read or hold no text.
    """
    source = ", ".join(files)
    corpus = text_source(files, what=f"{name}_files")
    if hasattr(corpus, "__len__"):
        corpus = corpus.shuffle(seed=SEED)
    try:
        documents = list(up_to((whole_characters(row["text"]) for row in corpus if has_text(row)), max_bytes))
    except (OSError, ValueError) as error:  # an interrupted stream
        raise UserError(f"{name}_files: {source} cannot be read ({first_line(error)})") from error
    if not documents:
        raise UserError(f"{name}_files: no text in {source}; every document is empty")
    return Text(name, documents, source)


def has_text(row: Mapping[str, str | None]) -> bool:
    return bool(row["text"]) and not row["text"].isspace()


def up_to(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Yield whole documents until they have `max_bytes` in total."""
    size = 0
    for document in documents:
        yield document
        size += len(document.encode())
        if size >= max_bytes:
            return
