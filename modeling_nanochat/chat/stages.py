"""The table of training stages, from which scripts, ladder, reports, model cards and chats take their names."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: The stage's folder in a run, and the name of its log, record and results.
        script: The name of its script and of its YAML file, without suffix.
        title: Its name in reports.
        predecessor: The stage whose model it starts from.
        note: What a user should know before the first question to its model; a finished chat model needs no note.
    """

    name: str
    script: str
    title: str
    predecessor: str | None = None
    note: str = ""

    @property
    def chats(self) -> bool:
        """Whether its model has been trained on conversations."""
        return self.predecessor is not None


BASE_NOTE = (
    "a base model: it continues text and has never seen a conversation, so expect no answers; "
    "chat with the model after midtraining, SFT or GRPO"
)
MID_NOTE = "a midtrained model: it has seen conversations among other text; the model after SFT answers better"

ROWS = (
    Stage("base", "pretrain", "Base", note=BASE_NOTE),
    Stage("mid", "midtrain", "Mid", predecessor="base", note=MID_NOTE),
    Stage("sft", "sft", "SFT", predecessor="mid"),
    Stage("rl", "grpo", "RL", predecessor="sft"),
)
STAGES = {stage.name: stage for stage in ROWS}  # in the order of training
SCRIPTS = {stage.script: stage for stage in ROWS}
