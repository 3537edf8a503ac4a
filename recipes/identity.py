"""Writes conversations that teach a model who it is, from a persona: name, maker, character, skills, limits, facts.

    python recipes/identity.py --persona recipes/identity.yaml --output_file runs/identity.jsonl

    python recipes/identity.py --persona recipes/identity.yaml --output_file runs/identity.jsonl \\
        --with_model my-model --endpoint https://host/v1 --model_conversations 1000

The first needs no network and takes seconds; the same arguments give the same bytes. The second adds conversations
written by a model behind an OpenAI-compatible endpoint, with the key in OPENAI_API_KEY, and continues where it was
stopped. The file has one {"messages": [...]} per line: give it to midtraining and SFT among their --train_files.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.folders import write_jsonl
from recipes.identities.dialogues import Messages, has_phrases, write_dialogues
from recipes.identities.endpoint import Endpoint, Request, write_with_model
from recipes.identities.persona import Persona, read_persona


@dataclass
class IdentityArguments:
    """Whose conversations, how many, and who writes them."""

    output_file: str = field(metadata={"help": "JSONL file to write; an older one is replaced."})
    persona: str = field(default="recipes/identity.yaml", metadata={"help": "YAML file that says who the model is."})
    conversations: int = field(default=1000, metadata={"help": "Conversations from our phrases."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})
    with_model: str | None = field(default=None, metadata={"help": "Model to ask for further conversations."})
    endpoint: str | None = field(
        default=None, metadata={"help": "Its OpenAI-compatible URL, such as https://host/v1."}
    )
    model_conversations: int = field(default=1000, metadata={"help": "Conversations to ask the model for."})
    retries: int = field(default=3, metadata={"help": "Further attempts after a bad reply or none."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds for one response of the endpoint."})
    parallel_requests: int = field(default=4, metadata={"help": "Requests to the endpoint at the same time."})

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A number is out of range, or only one of model and endpoint is given.
        """
        for name, least in {
            "conversations": 0,
            "model_conversations": 1,
            "retries": 0,
            "parallel_requests": 1,
        }.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name}: is {value}, must be at least {least}; correct the setting")
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"timeout: is {self.timeout}, must be a positive number of seconds; correct the setting")
        if (self.with_model is None) != (self.endpoint is None):
            raise UserError("with_model and endpoint belong together; give both, or neither")
        if not self.conversations and self.with_model is None:
            raise UserError("conversations: is 0, and no model is to write any; raise it, or give --with_model")


def main() -> None:
    (args,) = parse(IdentityArguments)
    persona, path = read_persona(args.persona), Path(args.output_file)
    if path.is_dir():
        raise UserError(f"output_file {path}: is a folder; give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        conversations = write_conversations(args, persona, path)
        write_jsonl(path, ({"messages": messages} for messages in conversations))
    except OSError as error:
        raise UserError(f"output_file {path}: cannot be written ({error.strerror}); choose another file") from error
    print(f"{path}: {summary(conversations)}")


def write_conversations(args: IdentityArguments, persona: Persona, path: Path) -> list[Messages]:
    """The conversations from our phrases, if the language has them or no model is asked, then the model's.

    Raises:
        UserError: There are no phrases in the persona's language, or the endpoint fails, or gives nothing of use.
    """
    own = args.with_model is None or has_phrases(persona.language)
    conversations = list(write_dialogues(persona, args.conversations, args.seed)) if own else []
    if args.with_model is None or args.endpoint is None:
        return conversations
    endpoint = Endpoint(args.endpoint, args.with_model, args.timeout, args.retries, args.parallel_requests)
    request = Request(persona, [messages[0]["content"] for messages in conversations], args.seed)
    written = write_with_model(endpoint, request, args.model_conversations, path.with_name(f"{path.name}.replies"))
    if endpoint.bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(endpoint.bad).most_common())
        print(f"bad replies of the model: {len(endpoint.bad)} ({reasons})")
    print(f"{args.with_model} wrote {len(written)} of {args.model_conversations} conversations")
    if not conversations + written:
        raise UserError(f"with_model {args.with_model}: none of its replies can be used; try another model")
    return conversations + written


def summary(conversations: Sequence[Messages]) -> str:
    """How many conversations and questions there are, and how varied they are."""
    questions = [message["content"] for messages in conversations for message in messages[::2]]
    openings = {messages[0]["content"] for messages in conversations}
    return (
        f"{len(conversations):,} conversations with {len(questions):,} questions; different are "
        f"{100 * len(set(questions)) / len(questions):.1f} % of the questions, "
        f"{100 * len(openings) / len(conversations):.1f} % of the openings"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
