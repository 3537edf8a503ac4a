"""Dialogues written by a model behind any OpenAI-compatible endpoint, each checked, and kept as soon as it has come.

aiohttp, which comes with datasets, instead of huggingface_hub's `InferenceClient`, which reads a reply of any length.
"""

import asyncio
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
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
    """An endpoint and how to treat it. `bad` counts the replies that were dropped, by reason."""

    url: str
    model: str
    timeout: float  # seconds for one response
    retries: int
    parallel: int  # requests at the same time
    backoff: float = 1.0  # seconds before the first retry, doubled for each further one
    bad: Counter[str] = field(default_factory=Counter)

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
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def client(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(self.timeout)  # for the whole response, however slowly it drips
        return aiohttp.ClientSession(timeout=timeout, headers=self.headers, trust_env=True)

    async def conversation(self, client: aiohttp.ClientSession, prompt: str) -> Messages | None:
        """The model's conversation; None if all attempts gave bad replies.

        Raises:
            UserError: The endpoint refuses the request, or the last attempt found it unavailable.
        """
        for attempt in range(self.retries + 1):
            unavailable = None
            try:
                return checked(await self.reply(client, prompt))
            except BadReply as error:
                self.bad[str(error)] += 1
            except Unavailable as error:
                unavailable = error
                if attempt < self.retries:
                    await asyncio.sleep(min(LONGEST_WAIT, error.wait or self.backoff * 2**attempt))
        if unavailable:
            raise UserError(
                f"endpoint {self.url}: {unavailable}, in the last of {self.retries + 1} attempts; run the same command "
                "later to continue, the conversations so far are kept"
            ) from unavailable
        return None

    async def reply(self, client: aiohttp.ClientSession, prompt: str) -> str:
        """The text of one reply."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 1.0}
        try:  # no redirects: the key is for this host
            async with client.post(self.url, json=body, allow_redirects=False) as response:
                content = await read_bounded(response)
        except TimeoutError as error:
            raise Unavailable(f"no complete response within {self.timeout:g} s") from error
        except aiohttp.InvalidURL as error:
            raise UserError(f"endpoint {self.url}: is no URL; correct it") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(one_line(error)) from error
        self.check_status(response, content)
        try:
            return json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise BadReply("not a chat completion") from error

    def check_status(self, response: aiohttp.ClientResponse, content: bytes) -> None:
        """
        Raises:
            Unavailable: Another attempt may succeed.
            UserError: It would not.
        """
        status, wait = response.status, response.headers.get("Retry-After", "")
        if status in TEMPORARY or status >= 500:
            raise Unavailable(f"answered with status {status}", float(wait) if wait.isdecimal() else None)
        if status != 200:
            said = one_line(Exception(content[:300].decode(errors="replace")))
            raise UserError(f"endpoint {self.url}: answered with status {status} ({said}); check URL, model and key")


async def read_bounded(response: aiohttp.ClientResponse) -> bytes:
    content = b""
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > MOST_BYTES:
            raise BadReply("too long")
    return content


def checked(reply: Any) -> Messages:
    """The conversation in a model's reply, which may be surrounded by other text.

    Raises:
        BadReply: It is no JSON, no alternation of user and assistant, or a text is empty or too long.
    """
    try:
        messages = json.loads(reply[reply.index("{") : reply.rindex("}") + 1])["messages"]
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
            examples="\n".join(f"- {example}" for example in examples),
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
    replies = Replies(path, [request.prompt(0), request.seed, endpoint.model])
    missing = [number for number in range(count) if number not in replies.by_number]
    asyncio.run(ask_for(endpoint, request, missing, replies))
    return [replies.by_number[number] for number in range(count) if number in replies.by_number]


async def ask_for(endpoint: Endpoint, request: Request, numbers: Sequence[int], replies: Replies) -> None:
    waiting = iter(numbers)
    progress = tqdm(total=len(numbers), disable=None, desc="asking the model", leave=False)

    async def ask_in_turn(client: aiohttp.ClientSession) -> None:
        for number in waiting:  # shared by all workers
            messages = await endpoint.conversation(client, request.prompt(number))
            if messages:
                replies.add(number, messages)
            progress.update()

    with progress:
        async with endpoint.client() as client:
            await asyncio.gather(*(ask_in_turn(client) for _ in range(endpoint.parallel)))
