"""`accelerate` on the model families and PEFT features that people fine-tune, against plain PEFT.

Each model is made from its config, two layers deep; an adapter with random A and B is put on it,
and one step of the patched copy is judged against PEFT's, with float64 as the truth.
"""

import copy
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from conftest import DEVICE, make_lora
from peft import LoHaConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from lorapar import groups, served
from lorapar.errors import UserError
from lorapar.patch import Report, accelerate, lora_layers, restore
from lorapar_kernels import LoraMask
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

IDS = torch.tensor([[1, 5, 9, 30, 7, 11], [1, 8, 3, 2, 4, 6]], device=DEVICE)
TEXT = {"input_ids": IDS}
TEXT_TO_TEXT = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
SOUND = {"input_features": torch.linspace(-1, 1, 320, device=DEVICE).sin().view(2, 8, 20),
         "decoder_input_ids": IDS[:, :4]}  # fmt: skip
PIXELS = {"pixel_values": torch.linspace(-9, 9, 384, device=DEVICE).sin().view(2, 3, 8, 8)}
# One image of 4 patches a row, 2 x 2 merged into the one token 40.
IMAGE_AND_TEXT = {
    "input_ids": torch.tensor([[1, 41, 40, 42, 7, 11], [1, 41, 40, 42, 4, 6]], device=DEVICE),
    "pixel_values": torch.linspace(-9, 9, 8 * 96, device=DEVICE).sin().view(8, 96),
    "image_grid_thw": torch.tensor([[1, 2, 2]] * 2, device=DEVICE),
    "mm_token_type_ids": torch.tensor([[0, 0, 1, 0, 0, 0]] * 2, device=DEVICE),
}

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
WIDE_HEADS = LLAMA | {"head_dim": 8}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
      "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}  # fmt: skip
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 8, "patch_size": 4}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
DEEPSEEK = LLAMA | EXPERTS | {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
GEMMA3N = WIDE_HEADS | {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 4, "sliding_window": 4,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    "activation_sparsity_pattern": [0.0] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

QKV, GATE_UP = "q_proj k_proj v_proj", "gate_proj up_proj"
EXPERT_WEIGHTS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


class Family(NamedTuple):
    model: str  # of transformers
    config: dict[str, Any]
    groups: dict[str, int]  # leaf names of a group → how many there are
    plans: dict[str, int]  # as reported: plan, or "peft" → how many layers
    inputs: dict[str, torch.Tensor] = TEXT
    lora: dict[str, Any] = {}
    more_calls: int = 0  # of served layers in one forward, than one each


FAMILIES = {
    "Llama": Family(
        "LlamaForCausalLM", LLAMA, {QKV: 2, GATE_UP: 2}, {"lora_linear_group": 10, "lora_linear": 4}
    ),
    "Mistral": Family(
        "MistralForCausalLM", LLAMA | {"sliding_window": 4}, {QKV: 2, GATE_UP: 2},
        {"lora_linear_group": 10, "lora_linear": 4},
    ),
    "Qwen2": Family(
        "Qwen2ForCausalLM", LLAMA, {QKV: 2, GATE_UP: 2}, {"lora_linear_group": 10, "lora_linear": 4}
    ),
    "Qwen3": Family(
        "Qwen3ForCausalLM", WIDE_HEADS, {QKV: 2, GATE_UP: 2},
        {"lora_linear_group": 10, "lora_linear": 4},
    ),
    "Gemma2": Family(
        "Gemma2ForCausalLM", WIDE_HEADS, {QKV: 2, GATE_UP: 2},
        {"lora_linear_group": 10, "lora_linear": 4},
    ),
    "Gemma3": Family(
        "Gemma3ForCausalLM", WIDE_HEADS, {QKV: 2, GATE_UP: 2},
        {"lora_linear_group": 10, "lora_linear": 4},
    ),
    "Gemma3n": Family(  # its last two layers take the k and v of earlier ones
        "Gemma3nForCausalLM", GEMMA3N, {QKV: 2, GATE_UP: 4},
        {"lora_linear_group": 14, "lora_linear": 45}, more_calls=4,  # routers twice a layer
    ),
    "Phi": Family(
        "PhiForCausalLM", LLAMA, {QKV: 2}, {"lora_linear_group": 6, "lora_linear": 6}
    ),
    "Phi3": Family("Phi3ForCausalLM", LLAMA, {}, {"lora_linear": 8}),
    "GPT-NeoX": Family("GPTNeoXForCausalLM", LLAMA, {}, {"lora_linear": 8}),
    "GPT-2": Family("GPT2LMHeadModel", GPT2, {}, {"lora_add": 8}),
    "OPT": Family(
        "OPTForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
        {QKV: 2}, {"lora_linear_group": 6, "lora_linear": 8},
    ),
    "Falcon": Family(  # its linear layers are a subclass of nn.Linear
        "FalconForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        {}, {"lora_add": 8},
    ),
    "BLOOM": Family(
        "BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        {}, {"lora_linear": 8},
    ),
    "T5": Family(
        "T5ForConditionalGeneration", T5, {"k v": 6, "wi_0 wi_1": 4},
        {"lora_linear_group": 20, "lora_linear": 16}, TEXT_TO_TEXT,
    ),
    "BART": Family(
        "BartForConditionalGeneration", BART | {"vocab_size": 64}, {"k_proj v_proj": 6},
        {"lora_linear_group": 12, "lora_linear": 20}, TEXT_TO_TEXT,
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        BART | {"vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 10,
                "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
                "eos_token_id": 2, "decoder_start_token_id": 1},
        {"k_proj v_proj": 6}, {"lora_linear_group": 12, "lora_linear": 20}, SOUND,
    ),
    "BERT": Family(
        "BertForSequenceClassification",
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_labels": 3},
        {"query key value": 2}, {"lora_linear_group": 6, "lora_linear": 7},
        lora={"task_type": "SEQ_CLS"},  # its classifier is saved as a whole
    ),
    "ALBERT": Family(  # one block, called twice
        "AlbertModel",
        {"vocab_size": 64, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4},
        {"query key value": 1}, {"lora_linear_group": 3, "lora_linear": 5}, more_calls=6,
    ),
    "ViT": Family(
        "ViTForImageClassification", VISION | {"num_labels": 3}, {QKV: 2},
        {"lora_linear_group": 6, "lora_linear": 7}, PIXELS,
    ),
    "CLIP": Family(
        "CLIPVisionModel", VISION, {QKV: 2}, {"lora_linear_group": 6, "lora_linear": 6}, PIXELS
    ),
    "Qwen2-VL": Family(
        "Qwen2VLForConditionalGeneration",
        {"text_config": LLAMA | {"rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
         "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4,
                           "patch_size": 4},
         "image_token_id": 40, "vision_start_token_id": 41, "vision_end_token_id": 42},
        {QKV: 2, GATE_UP: 2}, {"lora_linear_group": 10, "lora_linear": 14}, IMAGE_AND_TEXT,
    ),
    "Mixtral": Family(
        "MixtralForCausalLM", LLAMA | EXPERTS | {"num_local_experts": 4}, {QKV: 2},
        {"lora_linear_group": 6, "lora_linear": 2, "peft": 4},
        lora={"target_modules": ATTENTION, "target_parameters": EXPERT_WEIGHTS},
    ),
    "Qwen3-MoE": Family(
        "Qwen3MoeForCausalLM",
        WIDE_HEADS | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16,
                                "mlp_only_layers": [0]},
        {QKV: 2}, {"lora_linear_group": 6, "lora_linear": 2, "peft": 2},
        lora={"target_modules": ATTENTION, "target_parameters": EXPERT_WEIGHTS},
    ),
    "DeepSeek-V2": Family(
        "DeepseekV2ForCausalLM", DEEPSEEK, {}, {"lora_linear": 10, "peft": 2},
        lora={"target_modules": MLA, "target_parameters": EXPERT_WEIGHTS},
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM", DEEPSEEK, {}, {"lora_linear": 10, "peft": 2},
        lora={"target_modules": MLA, "target_parameters": EXPERT_WEIGHTS},
    ),
    "Mamba": Family(  # it reads dt_proj's weight and never calls it, so no adapter of it trains
        "MambaForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2,
         "time_step_rank": 4},
        {}, {"lora_linear": 6},
        lora={"target_modules": ["in_proj", "x_proj", "dt_proj"]}, more_calls=-2,
    ),
}  # fmt: skip


def make(model: str, config: dict[str, Any], **lora: Any) -> nn.Module:
    """A random model of transformers with an adapter. Eager attention: the same bits always."""
    torch.manual_seed(0)
    kind = getattr(transformers, model)
    base = kind(kind.config_class(**config, attn_implementation="eager"))
    settings = {"target_modules": "all-linear", "task_type": None}
    return make_lora(base, **(settings | lora)).to(DEVICE).eval()


def step(model: nn.Module, inputs: dict[str, torch.Tensor]):
    """The model's first output, and the gradients of one step."""
    model.zero_grad()
    y = model(**inputs)[0]
    y.square().cumsum(-1).mean().backward()  # weighted, or what a norm has made would weigh nothing
    return y.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def judge(
    patched: nn.Module,
    plain: nn.Module,
    inputs: dict[str, torch.Tensor] = TEXT,
    third: nn.Module | None = None,
) -> dict[str, torch.Tensor]:
    """One step of both against the same model in float64; the gradients of the patched one.

    `third` becomes the model in float64 where PEFT's cannot be copied.
    """
    exact = (copy.deepcopy(plain) if third is None else third).double()
    exact_inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    (y, g), (y0, g0) = step(patched, inputs), step(plain, inputs)
    ye, ge = step(exact, exact_inputs)
    assert_as_accurate("output", y, ye, y0)
    assert g.keys() == g0.keys() and any("lora_" in name and g0[name].any() for name in g0)
    for name in g:
        assert_as_accurate(name, g[name], ge[name], g0[name], NETWORK_FACTOR)
    return g


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def restored(patched: nn.Module, plain: nn.Module, inputs: dict[str, torch.Tensor] = TEXT) -> None:
    """Nothing waits in a group, and `restore` gives PEFT's model back, bit for bit."""
    links = [
        m.__dict__[groups.GROUP] for m in lora_layers(patched).values() if groups.GROUP in vars(m)
    ]
    assert all(group.pending is None for group, _ in links)
    restore(patched)
    assert kinds(patched) == kinds(plain)
    with torch.no_grad():
        assert torch.equal(patched(**inputs)[0], plain(**inputs)[0])


def plans(report: Report) -> Counter:
    return Counter(row["plan"] for row in report.as_dict().values())


@pytest.fixture
def computed(monkeypatch) -> Counter:
    """How many layers each op has computed."""
    counts = Counter()

    def count(module, name, size):
        op = getattr(module, name)

        def counted(*args, **options):
            counts[name] += size(*args)
            return op(*args, **options)

        monkeypatch.setattr(module, name, counted)

    count(served, "lora_linear", lambda *a: 1)
    count(served, "lora_add", lambda *a: 1)
    count(groups, "lora_linear_group", lambda x, projections: len(projections))
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name, computed):
    family = FAMILIES[name]
    plain = make(family.model, family.config, **family.lora)
    patched = copy.deepcopy(plain)
    report = accelerate(patched)
    leaves = Counter(" ".join(n.rsplit(".")[-1] for n in names) for names in report.groups)
    assert leaves == family.groups and plans(report) == family.plans
    assert all("ParamWrapper" in reason for reason in report.skipped.values())
    with torch.no_grad():
        patched(**family.inputs)
    assert computed.total() == len(report.served) + family.more_calls
    judge(patched, plain, family.inputs)
    restored(patched, plain, family.inputs)


@pytest.mark.parametrize("name", ["Llama", "Gemma3n", "T5", "BART", "Qwen2-VL"])
def test_a_family_under_gradient_checkpointing(name, computed):
    """The recomputed forward makes the same decisions, whatever calls the layers."""
    family = FAMILIES[name]
    model = make(family.model, family.config, **family.lora).train()
    accelerate(model)
    steps, counts = [], []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        computed.clear()
        torch.manual_seed(1)  # some families drop out
        steps.append(step(model, family.inputs))
        counts.append(computed.total())
    (y, g), (y0, g0) = steps
    assert counts[1] > counts[0] and torch.equal(y, y0) and g.keys() == g0.keys()
    assert all(torch.equal(g[name], g0[name]) for name in g)


class Feature(NamedTuple):
    lora: dict[str, Any]
    plans: dict[str, int] = {"lora_linear_group": 10, "lora_linear": 4}
    family: str = "Llama"
    trains: str = "lora_B"  # part of the name of a parameter that gets a gradient
    reason: str = ""  # for what is left to PEFT
    config: dict[str, Any] = {}


ALL_LEFT = {"peft": 14}
FEATURES = {
    "ranks and alphas by pattern": Feature(
        {"rank_pattern": {"q_proj": 3, "up_proj": 9}, "alpha_pattern": {"v_proj": 64}}
    ),
    "rsLoRA": Feature({"use_rslora": True}),
    **{
        f"{how} as the start": Feature({"init_lora_weights": how, "init_std": 0.0})
        for how in ("gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal")
    },
    "a bias of B": Feature({"lora_bias": True}, trains="lora_B.default.bias"),
    "a bias of B and one of the base": Feature(
        {"lora_bias": True}, {"lora_linear_group": 6, "lora_linear": 6}, "Phi",
        "lora_B.default.bias",
    ),
    "all biases train": Feature(
        {"bias": "all"}, {"lora_linear_group": 6, "lora_linear": 6}, "Phi", "layernorm.bias"
    ),
    "biases of the layers train": Feature(
        {"bias": "lora_only"}, family="Qwen2", trains="q_proj.base_layer.bias"
    ),
    "lm_head is saved": Feature({"modules_to_save": ["lm_head"]}, trains="lm_head.modules_to"),
    "embed_tokens is saved": Feature(
        {"modules_to_save": ["embed_tokens"]}, trains="embed_tokens.modules_to"
    ),
    "some tokens train": Feature(
        {"trainable_token_indices": [5, 9]}, trains="trainable_tokens_delta"
    ),
    "replicated layers": Feature(
        {"layer_replication": [[0, 2], [1, 2]]}, {"lora_linear_group": 15, "lora_linear": 6},
        trains="layers.2.self_attn.q_proj.lora_B",
    ),
    "one layer of two": Feature(
        {"layers_to_transform": [1], "target_modules": ATTENTION},
        {"lora_linear_group": 3, "lora_linear": 1},
    ),
    "embed_tokens": Feature(
        {"target_modules": ["q_proj", "embed_tokens"]}, {"lora_linear": 2, "peft": 1},
        trains="lora_embedding_B", reason="layer.Embedding",
    ),
    "tied embed_tokens and lm_head": Feature(
        {"target_modules": ["embed_tokens", "lm_head"]}, {"lora_linear": 1, "peft": 1},
        trains="lora_embedding_B", reason="layer.Embedding",
        config={"tie_word_embeddings": True},
    ),
    "embed_tokens and lm_head with one adapter": Feature(
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"lora_linear": 1, "peft": 1}, trains="lora_embedding_B", reason="layer.Embedding",
        config={"tie_word_embeddings": True},
    ),
    "DoRA": Feature(
        {"use_dora": True}, ALL_LEFT, trains="lora_magnitude_vector", reason="DoraLinearVariant"
    ),
    "aLoRA": Feature(
        {"alora_invocation_tokens": [8, 3], "task_type": "CAUSAL_LM"}, ALL_LEFT,
        reason="ALoraLinearVariant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature(name, computed):
    feature = FEATURES[name]
    model, config, *_ = FAMILIES[feature.family]
    plain, patched, third = (make(model, config | feature.config, **feature.lora) for _ in "123")
    report = accelerate(patched)
    assert plans(report) == feature.plans
    assert all(feature.reason in reason for reason in report.skipped.values())
    grads = judge(patched, plain, third=third)
    assert any(feature.trains in name and grad.any() for name, grad in grads.items())
    assert computed.total() == len(report.served)
    restored(patched, plain)


def inject(model: nn.Module, config: LoraConfig) -> nn.Module:
    return inject_adapter_in_model(config, model)


def add_to_transformers(model: nn.Module, config: LoraConfig) -> nn.Module:
    model.add_adapter(config)
    return model


def wrap_the_inner_model(model: nn.Module, config: LoraConfig) -> nn.Module:
    model.model = get_peft_model(model.model, config)
    return model


def mix(model: nn.Module, config: LoraConfig) -> nn.Module:
    """LoHa under LoRA on k_proj, over it on q_proj."""
    loha = {"r": 2, "init_weights": False}
    model = get_peft_model(model, LoHaConfig(target_modules=["k_proj"], **loha), "one", mixed=True)
    model.add_adapter("lora", config)
    model.add_adapter("two", LoHaConfig(target_modules=["q_proj"], **loha))
    model.set_adapter(["one", "lora", "two"])
    return model


ROUTES = {
    inject: {"lora_linear_group": 10, "lora_linear": 2},
    add_to_transformers: {"lora_linear_group": 10, "lora_linear": 2},
    wrap_the_inner_model: {"lora_linear_group": 10, "lora_linear": 2},
    mix: {"lora_linear_group": 4, "lora_linear": 6, "lora_add": 2},
}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_a_route_by_which_layers_come_in(route, computed, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.20.0")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, attn_implementation="eager")
    targets = [*ATTENTION, "gate_proj", "up_proj"]
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    plain = route(transformers.LlamaForCausalLM(config), lora).to(DEVICE).eval()
    patched = copy.deepcopy(plain)
    report = accelerate(patched)
    assert plans(report) == ROUTES[route]
    judge(patched, plain)
    assert computed.total() == len(report.served) == 12
    restored(patched, plain)


def two_adapters() -> tuple[nn.Module, nn.Module]:
    """PEFT's and a patched copy; the adapter `other` is on q_proj and v_proj alone."""
    plain = make("LlamaForCausalLM", LLAMA, task_type="CAUSAL_LM")
    plain.add_adapter(
        "other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    plain.eval().to(DEVICE)
    patched = copy.deepcopy(plain)
    accelerate(patched)
    return plain, patched


def test_several_active_adapters(computed):
    plain, patched = two_adapters()
    for model in (plain, patched):
        model.base_model.set_adapter(["default", "other"])
    for _ in range(2):  # activated after the patch, and before it
        computed.clear()
        grads = judge(patched, plain)
        assert any("q_proj.lora_B.other" in name for name in grads)
        assert computed.total() == 10  # all but q_proj and v_proj
        report = accelerate(patched)
    assert plans(report) == {"lora_linear_group": 4, "lora_linear": 6, "peft": 4}
    assert set(report.skipped.values()) == {"2 active adapters here; one is needed"}
    restored(patched, plain)


@torch.no_grad()
def test_batches_of_several_adapters(computed):
    plain, patched = two_adapters()
    alone = patched(input_ids=IDS).logits
    computed.clear()
    names = ["other", "__base__"]
    y, y0 = (m(input_ids=IDS, adapter_names=names).logits for m in (patched, plain))
    assert_close("logits", y, y0)
    assert not computed and not torch.equal(y, alone)
    y = patched.generate(input_ids=IDS, adapter_names=names, max_new_tokens=4, do_sample=False)
    y0 = plain.generate(input_ids=IDS, adapter_names=names, max_new_tokens=4, do_sample=False)
    assert torch.equal(y, y0) and not computed
    assert torch.equal(patched(input_ids=IDS).logits, alone)
    restored(patched, plain)


class Mixture(nn.Module):
    """What no language model of the families has."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(4, 16, 3, padding=1)
        self.two = nn.Conv2d(1, 3, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.Linear(16, 6)

    def forward(self, x):
        x = self.two(self.one(x)[:, None]).sum(1).mT
        return (self.last(self.attention(x, x, x)[0]),)


def mixture() -> nn.Module:
    torch.manual_seed(0)
    lora = make_lora(Mixture(), target_modules=["one", "two", "attention", "last"], task_type=None)
    return lora.to(DEVICE).eval()


def test_convolutions_and_multihead_attention_are_left(computed):
    plain, patched = mixture(), mixture()
    report = accelerate(patched)
    reasons = {n.removeprefix("base_model.model."): why for n, why in report.skipped.items()}
    for name, kind in (("one", "Conv1d"), ("two", "Conv2d"), ("attention", "MultiheadAttention")):
        assert f"layer.{kind}, no LoRA layer over one linear" in reasons[name]
    judge(patched, plain, {"x": torch.randn(2, 4, 9, device=DEVICE)})
    assert computed == {"lora_linear": 1}
    restored(patched, plain, {"x": torch.randn(2, 4, 9, device=DEVICE)})


def test_the_output_projection_of_multihead_attention_is_not_reported_as_served():
    """nn.MultiheadAttention reads its weight and never calls it: a mask would be lost."""
    model = mixture()
    report = accelerate(model)
    assert list(report.served) == ["base_model.model.last"]
    name = "base_model.model.attention.base_layer.out_proj"
    weights = (model.get_submodule(name).get_submodule(f"lora_{s}").default.weight for s in "AB")
    with pytest.raises(UserError, match="(?s)their mask forbids.*out_proj"):
        accelerate(model, {name: LoraMask(*(torch.zeros_like(w).bool() for w in weights))})


GENERATORS = {
    "Llama": ("LlamaForCausalLM", LLAMA),
    "T5": ("T5ForConditionalGeneration", T5 | {"pad_token_id": 0, "eos_token_id": 2}),
    "BART": ("BartForConditionalGeneration", BART | {"vocab_size": 64, "forced_eos_token_id": 2}),
}
HOWS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", GENERATORS)
def test_generated_tokens(name, how, computed):
    """Greedy, of a batch with padding on the left."""
    model, config = GENERATORS[name]
    plain = make(model, config)
    patched = copy.deepcopy(plain)
    accelerate(patched)
    options = {"attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]], device=DEVICE),
               "min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    made, made0 = (m.generate(IDS, **options, **HOWS[how]) for m in (patched, plain))
    assert computed.total() > 0 and torch.equal(made.sequences, made0.sequences)
    for i, (y, y0) in enumerate(zip(made.logits, made0.logits, strict=True)):
        assert_close(f"logits of token {i}", y, y0)
    restored(patched, plain, TEXT if name == "Llama" else TEXT_TO_TEXT)
