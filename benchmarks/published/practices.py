"""How frameworks train where a row does not say: one entry for each, with its source.

The first entry with a word in the row's framework holds, the last holds for every other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autoparallel.cost.practice import Attention


@dataclass(frozen=True)
class Practice:
    """What a framework does unless told otherwise."""

    words: tuple[str, ...]
    source: str
    overlaps_from: int = 0
    """The lowest distribute_param at which gradients are reduced, and parameters gathered, beside compute."""
    fused: bool = True
    """Element-wise kernels are merged: by a compiler, or written so by hand."""
    merged_norms: bool = False
    """Of all element-wise kernels, those of normalisations are merged."""
    merged_loss: bool = True
    """The loss is one kernel with the cast of the logits."""
    attention: Attention = "flash"
    flash: Attention = "flash"
    """Whose kernel a row means by "flash" without a version."""
    gathers_ahead: bool = True
    """Parameters with sharded states are gathered beside the next forward."""
    gathers_each_parameter: bool = False
    """One collective for each sharded tensor."""
    keeps_gathered: bool = True
    """What sequence parallelism gathers ahead of a matmul stays for its backward; Megatron-LM gathers it again."""
    accumulates_in_matmul: bool = False
    """Megatron-LM's gradient_accumulation_fusion, its default since 2022."""
    tensor_overlap: bool = False
    """Collectives of tensor parallelism run beside the matmuls next to them."""
    blocking_sends: Literal["never", "one", "always"] = "never"
    """Whether stages wait for what they send: where a rank has one stage, or several too."""
    scatters_sends: bool = False
    """Tensor-parallel ranks send a part each."""
    dispatch_s: float | None = None
    """Host time for each kernel, where it is known to be another than PyTorch's."""
    distribute_param: int = 0
    sequence_parallel: bool = False
    """With tensor parallelism."""
    gradient_dtype: str | None = None
    """In which gradients are summed; None is fp32, as ours are."""
    sums_half: bool = False
    """Where training is in fp16, gradients are summed in it."""
    master_dtype: str = "float32"
    optimizer: str = "adamw"
    optimizer_workspace_bytes: int | None = 0
    """Of each element, while it steps; merged optimizers need none, None is PyTorch's."""
    dropout: float = 0.0
    selective_share: float | None = None
    """Of the matmuls, those that its selective recomputation runs again; priced as so many blocks in full."""
    interleaves: bool = False
    """Pipelines have virtual stages."""
    fills_stages: bool = False
    """Layers that do not divide over the stages fill all but the last; otherwise they are spread."""


NEVER = 4
PRACTICES: tuple[Practice, ...] = (
    Practice(
        ("megascale",),
        "Jiang et al., arXiv 2402.15627, sections 3.1 to 3.3: ZeRO with prefetched gathers, FlashAttention-2, merged "
        "normalisation and GeLU; collectives of tensor parallelism beside matmuls",
        tensor_overlap=True,
        distribute_param=1,
        sequence_parallel=True,
        gradient_dtype="float32",
        accumulates_in_matmul=True,
        keeps_gathered=False,
    ),
    Practice(
        ("zero-bubble",),
        "Qi et al., arXiv 2401.10241: Megatron-LM in fp16, no flash attention (its memory of activations says so)",
        overlaps_from=NEVER,
        attention="unfused",
        dropout=0.1,
        accumulates_in_matmul=True,
        keeps_gathered=False,
        scatters_sends=True,
        blocking_sends="always",
    ),
    Practice(
        ("lit-gpt", "litgpt", "tinyllama"),
        "TinyLlama's README: FSDP, FlashAttention-2, merged normalisation, SwiGLU, cross entropy and rotary embedding",
        distribute_param=3,
    ),
    Practice(
        ("torchtune",),
        "torchtune's full_finetune recipes: parameters, gradients and AdamW's moments in bf16, flash SDPA, eager",
        merged_loss=False,
        fused=False,
        gradient_dtype="bfloat16",
        master_dtype="bfloat16",
    ),
    Practice(
        ("llm.c", "llmq", "llm.q"),
        "karpathy/llm.c and IST-DASLab/llmq: kernels merged by hand, cuDNN's attention, a classifier that writes its "
        "gradients over the logits, matmuls that add to the gradients, few or no launches from a host, ZeRO-1",
        attention="vendor",
        flash="vendor",
        distribute_param=1,
        gradient_dtype="bfloat16",
        accumulates_in_matmul=True,
        dispatch_s=2e-6,
    ),
    Practice(
        ("hugging", "transformers", "accelerate", "axolotl", "llama-factory"),
        "DeepSpeed ZeRO with its `overlap_comm` as Hugging Face's guides set it; eager kernels",
        optimizer_workspace_bytes=None,
        merged_loss=False,
        fused=False,
        distribute_param=2,
    ),
    Practice(
        ("megatron-deepspeed", "neox", "turing"),
        "Smith et al., arXiv 2201.11990; DeepSpeed's configuration: communication dtype is that of compute; the rates "
        "of its ZeRO-3 in table 2 of arXiv 2104.04473 (144, 88, 44 TFLOP/s on 384, 768, 1,536 GPUs) are those of "
        "gathers that hide behind nothing; Megatron-LM's merged kernels of bias, GeLU, dropout and softmax; a host "
        "time that the smallest of vTrain's runs have (3.4 to 3.7 ms a layer however few the tokens)",
        overlaps_from=NEVER,
        gathers_each_parameter=True,
        sums_half=True,
        dispatch_s=65e-6,
        attention="unfused",
        dropout=0.1,
        fills_stages=True,
        scatters_sends=True,
        blocking_sends="always",
    ),
    Practice(
        ("deepspeed", "zero"),
        "DeepSpeed's configuration: communication dtype is that of compute; gathers as above; PyTorch's own kernels",
        overlaps_from=NEVER,
        gathers_each_parameter=True,
        sums_half=True,
        fused=False,
        merged_loss=False,
        distribute_param=3,
    ),
    Practice(
        ("aa-scaling", "aleph"),
        "Hagemann et al., arXiv 2311.05610, section 3: ZeRO-1, flash attention, bf16; Aleph-Alpha/scaling, "
        "src/scaling/core/optimizer/optimizer.py: gradients in the compute dtype, reduced after the last backward and "
        "copied to fp32, PyTorch's AdamW on one tensor, parameters gathered after it",
        overlaps_from=NEVER,
        gathers_ahead=False,
        optimizer_workspace_bytes=8,
        merged_loss=False,
        fused=False,
        distribute_param=1,
        gradient_dtype="bfloat16",
        blocking_sends="always",
    ),
    Practice(
        ("nemo megatron",),
        "NeMo-Megatron-Launcher's conf/training/gpt3: distributed optimizer with overlap, masked softmax merged, no "
        "flash attention, dropout 0.1",
        attention="unfused",
        distribute_param=1,
        sequence_parallel=True,
        gradient_dtype="bfloat16",
        dropout=0.1,
        accumulates_in_matmul=True,
        keeps_gathered=False,
        scatters_sends=True,
        blocking_sends="one",
    ),
    Practice(
        ("maxtext", "jax", "levanter", "pax", "t5x"),
        "XLA merges element-wise kernels and overlaps collectives by its latency-hiding scheduler",
        distribute_param=3,
        gradient_dtype="float32",
    ),
    Practice(
        ("automodel",),
        "NVIDIA-NeMo/Automodel's performance summary: FSDP2 with prefetch, Transformer Engine's layers",
        attention="vendor",
        flash="vendor",
        fused=False,
        merged_norms=True,
        distribute_param=3,
        gradient_dtype="float32",
    ),
    Practice(
        ("bridge", "nemo", "megatron-core", "mcore", "primus", "transformer engine"),
        "Megatron Bridge's and NeMo's pages on communication overlap: distributed optimizer; gradients, parameters and "
        "tensor parallelism overlapped, sequence parallelism, Transformer Engine's attention and normalisation; "
        "interleaving in all their recipes with pipelines",
        interleaves=True,
        attention="vendor",
        flash="vendor",
        tensor_overlap=True,
        distribute_param=1,
        sequence_parallel=True,
        gradient_dtype="bfloat16",
        accumulates_in_matmul=True,
        keeps_gathered=False,
        blocking_sends="one",
    ),
    Practice(
        ("megatron",),
        "Narayanan et al., arXiv 2104.04473, section 4: merged kernels of bias, GeLU, dropout and softmax; gradients "
        "all-reduced after the last backward; Megatron-LM's arguments: dropout 0.1, and "
        "accumulate_allreduce_grads_in_fp32 for bf16 alone",
        sums_half=True,
        overlaps_from=NEVER,
        attention="unfused",
        dropout=0.1,
        keeps_gathered=False,
        scatters_sends=True,
        blocking_sends="always",
    ),
    Practice(
        ("llm-foundry", "composer", "mosaic"),
        "llm-foundry's yamls of MPT and Composer's FSDP: no torch.compile, FULL_SHARD with prefetch, low-precision "
        "LayerNorm, no dropout; mixed_precision DEFAULT reduces in fp32, PURE in the compute dtype; loss_fn "
        "fused_crossentropy; the first FlashAttention, as its Triton kernel or its package of that year",
        flash="flash-1",
        fused=False,
        distribute_param=3,
        gradient_dtype="float32",
    ),
    Practice(
        ("internlm", "internevo"),
        "InternLM's configs/7B_sft.py: overlap_sync_grad on, overlap_sync_param off; gradients in the compute "
        "dtype; flash-attn 1 among its requirements, SiLU and product apart; hybrid_zero_optim.py: gradients of a rank "
        "flattened and copied to fp32, AdamW tensor by tensor, all of a rank one tensor, with two more of its size",
        flash="flash-1",
        merged_norms=True,
        fused=False,
        gradient_dtype="bfloat16",
        optimizer_workspace_bytes=14,
        gathers_ahead=False,
        gathers_each_parameter=True,
        distribute_param=1,
        blocking_sends="always",
    ),
    Practice(
        ("torchtitan",),
        "torchtitan's docs and arXiv 2410.06511: FSDP2, bf16 parameters, fp32 reduction, flash SDPA; selective "
        "checkpointing keeps every second matmul (torchtitan/models/llama3/infra/parallelize.py)",
        selective_share=0.5,
        fused=False,
        distribute_param=3,
        sequence_parallel=True,
        gradient_dtype="float32",
    ),
    Practice(
        ("gemini", "colossal"),
        "ColossalAI's docs of Gemini: parameters and optimizer states in chunks over all ranks, fp32 masters",
        overlaps_from=NEVER,
        merged_loss=False,
        fused=False,
        distribute_param=3,
    ),
    Practice(
        ("fsdp",),
        "PyTorch's FSDP tutorial: mixed precision in bf16 throughout, prefetched gathers",
        optimizer_workspace_bytes=None,
        merged_loss=False,
        fused=False,
        distribute_param=3,
    ),
    Practice(
        ("",),
        "any other framework: eager kernels, flash attention, gradients reduced beside backward as "
        "DistributedDataParallel does",
        optimizer_workspace_bytes=None,
        merged_loss=False,
        fused=False,
        gradient_dtype="float32",
    ),
)


def practice_of(framework: str) -> Practice:
    """The entry for a framework by whatever name."""
    name = framework.casefold()
    return next(practice for practice in PRACTICES if any(word in name for word in practice.words))
