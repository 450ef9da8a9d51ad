"""The one prompt template of a run: scoring, SFT, RL and evaluation all use it.

Prompts are tokenised by the tokenizer's own rules (its BOS, once), completions without special
tokens and with one EOS, so that what is trained on is what generation continues.
"""

import re
from dataclasses import dataclass
from typing import Any

from lorapar.answers import split_answer
from lorapar.errors import UserError, nearest

XML_SYSTEM = (
    "Answer in this form:\n<reasoning>\nyour steps\n</reasoning>\n<answer>\nthe number\n</answer>"
)


@dataclass(frozen=True)
class Template:
    """How a row becomes text.

    prompt: with {question}. completion: with {text} (the whole answer), or {reasoning} and
    {answer}. marker: how the final answer is marked, `####` or `xml`. chat: the prompt becomes a
    user's message, after `system` if there is one, in the tokenizer's chat template.
    """

    prompt: str = "Question: {question}\nAnswer:"
    completion: str = " {text}"
    marker: str = "####"
    chat: bool = False
    system: str | None = None

    def prompt_of(self, question: str) -> str | list[dict[str, str]]:
        """What TRL calls the prompt: a string, or messages for a chat."""
        text = self.prompt.replace("{question}", question)
        if not self.chat:
            return text
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": text}]

    def completion_of(self, answer: str) -> str:
        reasoning, final = split_answer(answer)
        values = {"text": answer, "reasoning": reasoning, "answer": final}
        return re.sub(r"\{(text|reasoning|answer)\}", lambda m: values[m[1]], self.completion)

    def prompt_ids(self, tokenizer: Any, question: str) -> list[int]:
        """The prompt's tokens, as generation sees them."""
        prompt = self.prompt_of(question)
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        if not tokenizer.chat_template:
            raise UserError(
                "template: chat is on, but the model's tokenizer has no chat template; use gsm8k "
                "or xml, or a model that has one"
            )
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(encoded["input_ids"])

    def completion_ids(self, tokenizer: Any, answer: str) -> list[int]:
        """The reference answer's tokens, with one EOS."""
        text = self.completion_of(answer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]


TEMPLATES = {
    "gsm8k": Template(),
    "gsm8k_chat": Template(prompt="{question}", completion="{text}", chat=True),
    "xml": Template(
        prompt=XML_SYSTEM + "\n\n{question}\n",
        completion="<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
        marker="xml",
    ),
    "xml_chat": Template(
        prompt="{question}",
        completion="<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
        marker="xml",
        chat=True,
        system=XML_SYSTEM,
    ),
}


def make_template(value: str | dict[str, Any]) -> Template:
    """A named template, or one from the keys of `Template`.

    Raises:
        UserError: unknown name or key, or a prompt without {question}.
    """
    if isinstance(value, str):
        if value not in TEMPLATES:
            raise UserError(f"template {value!r} is unknown{nearest(value, TEMPLATES)}")
        return TEMPLATES[value]
    known = Template.__dataclass_fields__
    for key in value:
        if key not in known:
            raise UserError(f"template: unknown key {key!r}{nearest(key, known)}")
    template = Template(**value)
    if "{question}" not in template.prompt:
        raise UserError(f"template.prompt has no {{question}}: {template.prompt!r}")
    if not any(f"{{{key}}}" in template.completion for key in ("text", "answer")):
        raise UserError("template.completion has neither {text} nor {answer}")
    if template.marker not in ("####", "xml"):
        raise UserError(f"template.marker {template.marker!r} is neither '####' nor 'xml'")
    return template
