"""One template: scoring, SFT, RL and evaluation see the same tokens, BOS and EOS once."""

import pytest
from conftest import make_lora, make_tiny_model
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lorapar import stages
from lorapar.config import Config, Data
from lorapar.data import Row
from lorapar.errors import UserError
from lorapar.evaluation import prompts_of
from lorapar.importance import encode
from lorapar.template import TEMPLATES, Template, make_template

ROWS = [
    Row("1", "What is 23 + 48?", "23 + 48 = 71\n#### 71"),
    Row("2", "Ünïcode 🙂 {answer} ?", "1 + 1 = 2\n#### 1,000"),
]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(params=sorted(TEMPLATES))
def template(request):
    return TEMPLATES[request.param]


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = CHAT
    yield tokenizer
    tokenizer.chat_template = None


def config(tmp_path, template):
    return Config(model="", data=Data("x.jsonl"), template=vars(template), run_dir=str(tmp_path))


def test_every_stage_sees_the_same_tokens(template, chatty, tmp_path):
    tokenizer, model = chatty, make_lora(make_tiny_model())
    scored = encode(ROWS, template, tokenizer, model)
    evaluated = prompts_of(ROWS, [], template, tokenizer)
    assert [e.prompt for e in scored] == evaluated

    made, dropped = stages._dataset(config(tmp_path, template), "sft", ROWS, template, tokenizer)
    assert not dropped
    settings = {"use_cpu": True, "bf16": False, "report_to": "none"}
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, **settings),
        train_dataset=made,
        processing_class=tokenizer,
    )
    trained = trainer.train_dataset
    for e, ids, labels in zip(scored, trained["input_ids"], trained["labels"]):
        assert list(ids) == e.prompt + e.completion
        assert list(labels) == [-100] * len(e.prompt) + e.completion

    prompts, _ = stages._dataset(config(tmp_path, template), "rl", ROWS, template, tokenizer)
    grpo = GRPOTrainer(
        make_lora(make_tiny_model()),
        lambda completions, **k: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=2, num_generations=2, **settings
        ),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    generated = grpo._tokenize_prompts([row["prompt"] for row in prompts])[0]
    assert [list(ids) for ids in generated] == evaluated


def test_bos_and_eos_stand_once(template, chatty):
    for row in ROWS:
        prompt = template.prompt_ids(chatty, row.question)
        completion = template.completion_ids(chatty, row.answer)
        assert prompt.count(chatty.bos_token_id) == (0 if template.chat else 1)
        assert completion.count(chatty.eos_token_id) == 1 == (completion[-1] == chatty.eos_token_id)
        assert chatty.bos_token_id not in completion and chatty.eos_token_id not in prompt


def test_shots_have_one_bos(tokenizer):
    (prompt,) = prompts_of(ROWS[:1], ROWS[1:], TEMPLATES["gsm8k"], tokenizer)
    assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
    text = tokenizer.decode(prompt)
    assert text.index("Ünïcode") < text.index("#### 1,000") < text.index("23 + 48?")


def test_shots_lose_no_token_without_a_bos(tokenizer):
    class NoBos:
        bos_token_id = None
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens=True):
            return tokenizer(text, add_special_tokens=False)

    (prompt,) = prompts_of(ROWS[:1], [ROWS[1], ROWS[0]], TEMPLATES["gsm8k"], NoBos())
    assert tokenizer.decode(prompt).count("Question:") == 3


def test_a_chat_template_is_needed_for_a_chat(tokenizer):
    with pytest.raises(UserError, match="the model's tokenizer has no chat template"):
        TEMPLATES["gsm8k_chat"].prompt_ids(tokenizer, "Q?")


def test_texts():
    gsm8k, xml = TEMPLATES["gsm8k"], TEMPLATES["xml"]
    assert gsm8k.prompt_of("Q?") == "Question: Q?\nAnswer:"
    assert gsm8k.completion_of(ROWS[0].answer) == " 23 + 48 = 71\n#### 71"
    assert xml.completion_of(ROWS[0].answer) == (
        "<reasoning>\n23 + 48 = 71\n</reasoning>\n<answer>\n71\n</answer>\n"
    )
    assert "{answer}" in gsm8k.prompt_of(ROWS[1].question)  # a question is text, not a format
    assert xml.completion_of("a {answer} {text}\n#### 5").count("{answer} {text}") == 1
    messages = TEMPLATES["xml_chat"].prompt_of("Q?")
    assert [m["role"] for m in messages] == ["system", "user"]


def test_no_prompt_loses_its_instruction(tokenizer, tmp_path):
    """Too long a prompt is dropped and counted, never cut (defect D8)."""
    long = Row("3", "What is " + "1 + " * 200 + "1?", "#### 201")
    template = TEMPLATES["xml"]
    made, dropped = stages._dataset(
        config(tmp_path, template), "rl", [*ROWS, long], template, tokenizer
    )
    assert dropped == 1 and len(made) == 2
    assert all("number" in row["prompt"] and "</answer>" in row["prompt"] for row in made)
    with pytest.raises(UserError, match="rl: all 1 rows are longer than rl.max_prompt_length"):
        stages._dataset(config(tmp_path, template), "rl", [long], template, tokenizer)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gsm9k", "template 'gsm9k' is unknown; did you mean 'gsm8k'"),
        ({"promt": "x"}, "unknown key 'promt'; did you mean 'prompt'"),
        ({"prompt": "x"}, "template.prompt has no {question}"),
        ({"completion": "x"}, "neither {text} nor {answer}"),
        ({"marker": "boxed"}, "template.marker 'boxed' is neither"),
    ],
)
def test_bad_templates(value, message):
    with pytest.raises(UserError, match=message):
        make_template(value)


def test_own_template():
    own = make_template({"prompt": "{question} ->", "completion": "{answer}"})
    assert own == Template("{question} ->", "{answer}")
    assert own.completion_of("a\n#### 5") == "5"
