"""Dialogues written by a model behind any OpenAI-compatible endpoint, each checked, and kept as soon as it has come.

urllib instead of huggingface_hub's `InferenceClient`, which reads a response of any length for any time.
"""

import hashlib
import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from modeling_nanochat.errors import UserError, one_line

from .dialogues import Messages
from .persona import Persona, is_text

PROMPT = Path(__file__).parent / "request" / "prompt.yaml"
MOST_BYTES, MOST_CHARACTERS, MOST_MESSAGES = 1_000_000, 2000, 8  # of a response, a message, a conversation
EXAMPLES = 3  # openings shown to the model
LONGEST_WAIT = 60  # seconds between two attempts
TEMPORARY = {408, 409, 425, 429}  # status codes worth another attempt, beside 5xx


class BadReply(Exception):
    """The model's reply is no conversation that can be used; the message is the reason, from a fixed set."""


class Unavailable(Exception):
    """The endpoint gave no reply this time; `wait` is how many seconds it asks for, if it does."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass
class Endpoint:
    """An endpoint and how to treat it. `bad` has the reason of each reply that was dropped."""

    url: str
    model: str
    timeout: float  # seconds for one response
    retries: int
    parallel: int  # requests at the same time
    backoff: float = 1.0  # seconds before the first retry, doubled for each further one
    bad: list[str] = field(default_factory=list)  # appending is safe in threads

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: The URL or the key in OPENAI_API_KEY cannot be used.
        """
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"endpoint {self.url}: must begin with http:// or https://, as in https://host/v1")
        self.url = f"{self.url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY: contains characters that no key has; set it again")
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def conversation(self, prompt: str) -> Messages | None:
        """The model's conversation; None if all attempts gave bad replies.

        Raises:
            UserError: The endpoint refuses the request, or the last attempt found it unavailable.
        """
        for attempt in range(self.retries + 1):
            unavailable = None
            try:
                return checked(self.reply(prompt))
            except BadReply as error:
                self.bad.append(str(error))
            except Unavailable as error:
                unavailable = error
                if attempt < self.retries:
                    time.sleep(min(LONGEST_WAIT, error.wait or self.backoff * 2**attempt))
        if unavailable:
            raise UserError(
                f"endpoint {self.url}: {unavailable}, in the last of {self.retries + 1} attempts; run the same "
                "command later to continue, the conversations so far are kept"
            ) from unavailable
        return None

    def reply(self, prompt: str) -> str:
        """The text of one reply."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 1.0}
        deadline = time.monotonic() + self.timeout
        try:
            request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
            opener = urllib.request.build_opener(NoRedirects)
            with opener.open(request, timeout=self.timeout) as response:
                content = read_bounded(response, deadline)
        except urllib.error.HTTPError as error:
            raise self.refusal(error) from error
        except TimeoutError as error:
            raise Unavailable(f"no complete response within {self.timeout:g} s") from error
        except (http.client.InvalidURL, ValueError) as error:
            raise UserError(f"endpoint {self.url}: is no URL ({one_line(error)}); correct it") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(one_line(error)) from error
        try:
            return json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise BadReply("not a chat completion") from error

    def refusal(self, error: urllib.error.HTTPError) -> Exception:
        """`Unavailable` if another attempt may succeed, otherwise a `UserError` that quotes the response."""
        wait = error.headers.get("Retry-After", "")
        if error.code in TEMPORARY or error.code >= 500:
            return Unavailable(f"answered with status {error.code}", float(wait) if wait.isdecimal() else None)
        said = b""
        with suppress(OSError, http.client.HTTPException):
            said = error.read(300)
        quoted = one_line(Exception(said.decode(errors="replace") or error.reason))
        return UserError(
            f"endpoint {self.url}: answered with status {error.code} ({quoted}); check URL, model and key"
        )


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key is for one host: a redirect is an error."""

    def redirect_request(self, *_: Any) -> None:
        return None


def read_bounded(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body, until it has more than MOST_BYTES or `deadline` has passed, however slowly it comes."""
    content = b""
    while chunk := response.read1(65536):
        content += chunk
        if len(content) > MOST_BYTES:
            raise BadReply("too long")
        if time.monotonic() > deadline:
            raise TimeoutError
    return content


def checked(reply: Any) -> Messages:
    """The conversation in a model's reply, which may be surrounded by other text and follow a thought.

    Raises:
        BadReply: It is no JSON, no alternation of user and assistant, or a text is empty or too long.
    """
    try:
        said = reply.rpartition("</think>")[2]
        messages = json.loads(said[said.index("{") : said.rindex("}") + 1])["messages"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadReply("no JSON with messages") from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadReply("no JSON with messages")
    roles, texts = [m.get("role") for m in messages], [m.get("content") for m in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadReply("roles do not alternate from user to assistant")
    if not all(map(is_text, texts)):
        raise BadReply("an empty message")
    if len(texts) > MOST_MESSAGES or max(map(len, texts)) > MOST_CHARACTERS:
        raise BadReply("too long")
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, texts, strict=True)]


class Request:
    """The prompts for a persona: each draws a topic, a user, a dynamic and openings as examples from its own seed."""

    def __init__(self, persona: Persona, openings: Sequence[str], seed: int) -> None:
        self.texts = yaml.safe_load(PROMPT.read_text(encoding="utf-8"))
        self.persona, self.openings, self.seed = persona, openings, seed

    def prompt(self, number: int) -> str:
        rng = random.Random(f"identity request {self.seed} {number}")
        examples = rng.sample(self.openings, min(EXAMPLES, len(self.openings)))
        return self.texts["prompt"].format(
            persona=json.dumps(asdict(self.persona), ensure_ascii=False),
            language=self.persona.language,
            topic=rng.choice(self.texts["topics"]),
            user=rng.choice(self.texts["users"]),
            dynamic=rng.choice(self.texts["dynamics"]),
            examples="\n".join(f"- {example}" for example in examples) or "- (there are none yet)",
        )


class Replies:
    """Conversations by number, in a file to which each is appended at once; a run that was stopped continues there.

    Raises:
        UserError: The file belongs to other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: Any) -> None:
        self.path, self.by_number = path, dict[int, Messages]()
        header = json.dumps({"settings": hashlib.sha256(json.dumps(settings).encode()).hexdigest()})
        kept = path.read_bytes() if path.exists() else b""
        lines = kept[: kept.rfind(b"\n") + 1].splitlines()  # a killed process may leave half a line
        if not lines:
            path.write_text(f"{header}\n", encoding="utf-8")
            return
        if lines[0] != header.encode():
            raise UserError(f"{path}: holds replies for other settings; delete it, or give another --output_file")
        for number, line in enumerate(lines[1:], start=2):
            try:
                row = json.loads(line)
                self.by_number[row["number"]] = row["messages"]
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{path}:{number}: is damaged; delete the line") from error
        os.truncate(path, kept.rfind(b"\n") + 1)

    def add(self, number: int, messages: Messages) -> None:
        self.by_number[number] = messages
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"number": number, "messages": messages}, ensure_ascii=False) + "\n")


def write_with_model(endpoint: Endpoint, request: Request, count: int, path: Path) -> list[Messages]:
    """Up to `count` conversations from the endpoint, of which those in `path` are not asked for again.

    Raises:
        UserError: The endpoint refuses or is unavailable, or `path` belongs to other settings.
    """
    replies = Replies(path, [asdict(request.persona), request.texts, request.seed, endpoint.model])
    missing = [number for number in range(count) if number not in replies.by_number]
    for number, messages in tqdm(answers(endpoint, request, missing), "asking the model", len(missing), disable=None):
        if messages:
            replies.add(number, messages)
    return [replies.by_number[number] for number in range(count) if number in replies.by_number]


def answers(endpoint: Endpoint, request: Request, numbers: Sequence[int]) -> Iterator[tuple[int, Messages | None]]:
    """Yield (number, conversation) as they come; raises what a request raises.

    The threads are daemons: an executor would wait for open requests before Ctrl-C ends the process.
    """
    waiting, done = deque(numbers), queue.SimpleQueue[tuple[int, Any]]()

    def work() -> None:
        with suppress(IndexError):  # none is waiting
            while True:
                done.put(ask(waiting.popleft()))

    def ask(number: int) -> tuple[int, Any]:
        try:
            return number, endpoint.conversation(request.prompt(number))
        except Exception as error:
            waiting.clear()
            return number, error

    for _ in range(endpoint.parallel):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in numbers:
            number, found = done.get()
            if isinstance(found, Exception):
                raise found
            yield number, found
    finally:
        waiting.clear()
