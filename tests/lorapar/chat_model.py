"""A chat model of a few thousand numbers that answers by the last word of its prompt.

Its layers add nothing to the residual stream, so the next token depends on the last one alone:
after `fast` comes System1, after `slow` System2, after a label the end, after all else `hm`.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "System1", "System2", "hm", "fast", "slow"]
NEXT = {"fast": "System1", "slow": "System2", "System1": "</s>", "System2": "</s>"}
PROMPT = "{answer} {question}"  # the last word of the question decides


def save_chat_model(folder, *, context=256, template=True):
    """Writes the model and its tokenizer."""
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.unk_token = "<unk>"
    if template:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
        )
    tokenizer.save_pretrained(folder)
    size = 16
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=size, intermediate_size=size, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=context,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size)[: len(WORDS)])
        model.lm_head.weight.zero_()
        for i, word in enumerate(WORDS):
            model.lm_head.weight[WORDS.index(NEXT.get(word, "hm")), i] = 1.0
    model.save_pretrained(folder)
    return folder
