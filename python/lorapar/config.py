"""A run's configuration: one YAML file in, checked key by key, the resolved one out.

`adapter`, `sft` and `rl` are PEFT's `LoraConfig`, TRL's `SFTConfig` and `GRPOConfig`: their keys
pass through untouched, over the defaults below.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from lorapar.defaults import PRESETS
from lorapar.errors import UserError, nearest

INITS = ("paper", "paper_offset", "pissa", "olora", "orthogonal")
PROMPTS = ("role_play", "plain")  # files in prompts/; any other name is a file of the user's
PATHS = ("model", "data", "data.train", "data.test", "labels.prompt")
SCORE_VARIANTS = ("taylor2", "taylor1", "fisher", "random")


@dataclass(frozen=True)
class Data:
    """Where the rows come from. A path to JSONL or parquet, or a data set's name on the hub."""

    train: str
    test: str | None = None
    name: str | None = None  # the hub's configuration, "main" for openai/gsm8k
    train_rows: int | None = None  # use only the first so many
    test_rows: int | None = None
    select: str = "labels"  # "all": both stages train on everything, as the released script does


@dataclass(frozen=True)
class Teacher:
    """One voter.

    `rule` needs a name `rule:...`; `random` labels a share of the rows System 1 (`sampling:
    {system1: 0.5}`); `openai` needs base_url and model; `transformers` loads `model` right here.
    """

    name: str
    kind: str = "rule"
    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    weight: float = 1.0
    concurrency: int = 4  # requests in flight; the batch of `transformers`
    timeout: float = 120.0  # seconds a request
    retries: int = 6  # after 429, 5xx, a time-out or a lost connection
    structured: bool = True  # ask for JSON by a schema; a server that refuses is asked without
    sampling: dict[str, Any] = field(default_factory=dict)


RULES = tuple(
    Teacher(f"rule:{name}") for name in ("worked_steps", "operator_count", "question_length")
)


@dataclass(frozen=True)
class Labels:
    """Who votes on what prompt, and what happens without a majority (`ties`) or with few votes."""

    teachers: tuple[Teacher, ...] = RULES
    ties: str = "drop"  # or system1, system2
    min_votes: int = 1
    seed: int = 41
    prompt: str = "role_play"  # or plain, or a text file with {question} and {answer}
    target: str | None = None  # whom the teachers play; None: the name of `model`


@dataclass(frozen=True)
class Score:
    """The scoring pass: how many examples a system, how many at a time, which formula.

    `packed` puts a batch in one row without padding. `gradient_checkpointing` spends time to save
    memory. Neither of them, nor `batch_size`, changes the scores.
    """

    examples: int = 100
    batch_size: int = 16
    variant: str = "taylor2"
    packed: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class PartitionSettings:
    """θ and how the shared set is divided; `shared_in_sft` and `shared_in_rl` are α and β."""

    theta: float = 0.9
    shared_in_sft: float = 1.0
    shared_in_rl: float = 1.0
    granularity: str = "element"  # or column
    drop_unselected: bool = False
    per_layer: bool = False  # θ of each layer's own mass; not the paper's rule, which is global


@dataclass(frozen=True)
class Eval:
    """Greedy decoding of the test rows; `scorer` reads the answer (see lorapar.answers)."""

    batch_size: int = 16
    max_new_tokens: int = 256
    scorer: str = "number"
    shots: int = 0


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: str
    data: Data
    labels: Labels = field(default_factory=Labels)
    adapter: dict[str, Any] = field(default_factory=dict)
    init: str = "paper"
    score: Score = field(default_factory=Score)
    partition: PartitionSettings | None = field(default_factory=PartitionSettings)
    template: str | dict[str, Any] = "gsm8k"
    rewards: tuple[str | dict[str, float], ...] = (
        "correct_answer",
        "numeric_answer",
        "answer_format",
    )
    sft: dict[str, Any] = field(default_factory=dict)
    rl: dict[str, Any] = field(default_factory=dict)
    eval: Eval = field(default_factory=Eval)
    seed: int = 41
    run_dir: str = "runs/default"
    preset: str | None = None

    def to_yaml(self) -> str:
        """The resolved configuration, as a run folder keeps it."""
        return yaml.safe_dump(plain(self), sort_keys=False, allow_unicode=True)


def load(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Reads a YAML file, or the config.yaml of a run folder.

    Args:
        path: the file or the folder.
        overrides: dotted keys and values put over the file's, as from `--set sft.max_steps=10`.

    Raises:
        UserError: with file, line and key, what was found and what is needed.
    """
    path = Path(path)
    folder = path.is_dir()
    path = path / "config.yaml" if folder else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; expected a YAML configuration or a run folder"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    try:
        raw, lines = yaml.safe_load(text), _lines(yaml.compose(text))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(e, 'problem', e)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(raw).__name__}")
    for key, value in (overrides or {}).items():
        if key in PATHS and value not in PROMPTS and Path(str(value)).exists():
            value = str(Path(value).resolve())  # relative to here, not to the file
        if isinstance(raw.get("data"), str):
            raw["data"] = {"train": raw["data"]}
        _put(raw, key, value)
    moved = folder and (path.parent / "stages.json").exists() and isinstance(raw, dict)
    if moved and "run_dir" not in (overrides or {}):
        raw["run_dir"] = str(path.parent)  # wherever the run folder is now
    if isinstance(raw.get("data"), str):
        raw["data"] = {"train": raw["data"]}
    if raw.get("preset") is not None:
        if not isinstance(raw["preset"], str) or raw["preset"] not in PRESETS:
            raise UserError(
                f"{_at(path, lines, ('preset',))}: preset {raw['preset']!r} is unknown; expected "
                f"one of {', '.join(PRESETS)}"
            )
        raw = _merge(PRESETS[raw["preset"]], raw)
    return _check(_build(Config, raw, path, lines, ()), path, lines)


def parse_override(text: str) -> tuple[str, Any]:
    """`key.sub=value`, the value read as YAML."""
    key, sep, value = text.partition("=")
    if not sep or not key:
        raise UserError(f"--set {text}: expected key=value, such as sft.max_steps=10")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: {value!r} is not valid YAML") from None


def plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists, for YAML and for hashing."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _lines(node: yaml.Node | None, path: tuple = ()) -> dict[tuple, int]:
    """Line number by key path."""
    found = {path: node.start_mark.line + 1} if node is not None else {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found |= _lines(value, (*path, key.value)) | {
                (*path, key.value): key.start_mark.line + 1
            }
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found |= _lines(value, (*path, i))
    return found


def _at(file: Path, lines: dict[tuple, int], path: tuple) -> str:
    while path and path not in lines:
        path = path[:-1]
    line = f":{lines[path]}" if path in lines else ""
    return f"{file}{line}"


def _put(raw: dict, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        if not isinstance(raw.get(key), dict):
            raw[key] = {}
        raw = raw[key]
    raw[last] = value


def _merge(under: dict, over: dict) -> dict:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


_SECTIONS = {
    "data": Data,
    "labels": Labels,
    "score": Score,
    "partition": PartitionSettings,
    "eval": Eval,
}


def _build(cls: type, raw: dict, file: Path, lines: dict[tuple, int], path: tuple) -> Any:
    known = {f.name: f for f in fields(cls)}
    section = ".".join(map(str, path)) or "the configuration"
    for key in raw:
        if key not in known:
            raise UserError(
                f"{_at(file, lines, (*path, key))}: unknown key {key!r} in {section}"
                f"{nearest(key, known)}"
            )
    missing = [
        f.name
        for f in known.values()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in raw
    ]
    if missing:
        raise UserError(f"{_at(file, lines, path)}: {section} needs {', '.join(missing)}")
    values = {k: _value(known[k].type, v, file, lines, (*path, k), cls) for k, v in raw.items()}
    return cls(**values)


def _value(kind: Any, value: Any, file: Path, lines: dict, path: tuple, owner: type) -> Any:
    """`value` as a field of type `kind`, or a UserError that says what was expected."""
    name, where = path[-1], _at(file, lines, path)
    if owner is Config and name in _SECTIONS:
        if name == "partition" and value is None:
            return None
        if name == "data" and isinstance(value, str):
            value = {"train": value}
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name} must be a mapping, found {value!r}")
        return _build(_SECTIONS[name], value, file, lines, path)
    if owner is Labels and name == "teachers":
        if not isinstance(value, list) or not all(isinstance(t, dict | str) for t in value):
            raise UserError(f"{where}: teachers must be a list, found {value!r}")
        rows = [{"name": t} if isinstance(t, str) else t for t in value]
        return tuple(_build(Teacher, t, file, lines, (*path, i)) for i, t in enumerate(rows))
    if name == "rewards":
        if not isinstance(value, list):
            raise UserError(f"{where}: rewards must be a list, found {value!r}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    allowed = tuple(typing.get_origin(member) or member for member in members)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        expected = " or ".join(a.__name__.replace("NoneType", "null") for a in allowed)
        raise UserError(f"{where}: {name} must be {expected}, found {value!r}")
    return value


def _check(config: Config, file: Path, lines: dict[tuple, int]) -> Config:
    """Value checks, and paths beside the file made absolute."""

    def fail(path: tuple, problem: str) -> None:
        raise UserError(f"{_at(file, lines, path)}: {problem}")

    def one_of(path: tuple, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            fail(path, f"{'.'.join(path)} {value!r} is unknown{nearest(value, allowed)}")

    one_of(("init",), config.init, INITS)
    one_of(("score", "variant"), config.score.variant, SCORE_VARIANTS)
    one_of(("labels", "ties"), config.labels.ties, ("drop", "system1", "system2"))
    one_of(("data", "select"), config.data.select, ("labels", "all"))
    for key in ("examples", "batch_size"):
        if getattr(config.score, key) < 1:
            fail(("score", key), f"score.{key} must be at least 1")
    if config.partition is not None:
        one_of(("partition", "granularity"), config.partition.granularity, ("element", "column"))
        for key in ("theta", "shared_in_sft", "shared_in_rl"):
            value = getattr(config.partition, key)
            if not 0 <= value <= 1:
                fail(("partition", key), f"partition.{key} must lie in [0, 1], found {value}")
        if config.partition.drop_unselected and config.partition.granularity != "column":
            fail(("partition", "drop_unselected"), "drop_unselected needs granularity: column")
    if not config.labels.teachers:
        fail(("labels", "teachers"), "labels.teachers is empty; name at least one teacher")
    names = [t.name for t in config.labels.teachers]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        fail(("labels", "teachers"), f"teachers share the name {repeated[0]!r}; names must differ")
    for section in ("adapter", "sft", "rl"):
        _numbers(getattr(config, section))
    if "init_lora_weights" in config.adapter:
        fail(
            ("adapter", "init_lora_weights"),
            "adapter.init_lora_weights is set by the key init (beside adapter); use one of "
            + ", ".join(INITS),
        )
    beside = file.parent
    data = dataclasses.replace(
        config.data, train=_path(beside, config.data.train), test=_path(beside, config.data.test)
    )
    prompt = config.labels.prompt
    prompt = prompt if prompt in PROMPTS else _path(beside, prompt)
    teachers = tuple(
        dataclasses.replace(t, model=_path(beside, t.model)) if t.kind == "transformers" else t
        for t in config.labels.teachers
    )
    labels = dataclasses.replace(config.labels, prompt=prompt, teachers=teachers)
    model = _path(beside, config.model)
    return dataclasses.replace(config, data=data, labels=labels, model=model)


def _numbers(section: dict[str, Any]) -> None:
    """1e-3 without a dot is a string in YAML 1.1; users of TRL write it, so read it."""
    for key, value in section.items():
        if isinstance(value, str):
            try:
                section[key] = float(value) if "e" in value.lower() else value
            except ValueError:
                pass


def _path(beside: Path, name: str | None) -> str | None:
    """A path relative to the configuration's folder, made absolute if it exists."""
    if name and not Path(name).is_absolute() and (beside / name).exists():
        return str((beside / name).resolve())
    return name
