"""Options of SGLang that are no fields of `ServerConfig`, and of vLLM: data, no code.

ACCEPTED  change nothing here; kept so that command lines written for SGLang still start
REFUSED   not in this release; each says why, and lets through values that ask for nothing
OF_VLLM   what to type instead
"""

from __future__ import annotations

from sgl.flags import Accepted, Refused, Takes


def _accepted(names: str, takes: Takes, why: str) -> Accepted:
    return Accepted(tuple(names.split()), takes, why)


def _refused(names: str, takes: Takes, harmless: str, why: str) -> Refused:
    return Refused(tuple(names.split()), takes, tuple(harmless.split()), why)


ACCEPTED = (
    _accepted("--enable-metrics", "nothing", "metrics are always on, at /metrics"),
    _accepted("--enable-mixed-chunk", "nothing", "prefill and decode always share a step"),
    _accepted(
        "--enable-overlap-schedule --enable-overlap-scheduler",
        "nothing",
        "scheduling always overlaps the device; --disable-overlap-schedule turns that off",
    ),
    _accepted(
        "--disable-flashinfer --disable-flashinfer-sampling",
        "nothing",
        "flashinfer runs only where --attention-backend asks for it",
    ),
    _accepted(
        "--attention-reduce-in-fp32 --triton-attention-reduce-in-fp32",
        "nothing",
        "the triton back end always sums in float32",
    ),
    _accepted("--enable-nan-detection", "nothing", "NaN logits are always detected"),
    _accepted(
        "--disable-penalizer", "nothing", "penalties cost nothing while no request uses them"
    ),
    _accepted(
        "--disable-disk-cache --disable-outlines-disk-cache --disable-mla",
        "nothing",
        "this release has nothing that it would turn off",
    ),
    _accepted("--additional-ports", "many", "the processes talk through memory and need no ports"),
)

_NO_QUANTIZATION = "weight quantisation is not in this release; serve the checkpoint as it is"
_NO_LORA = "LoRA adapters are not in this release; merge the adapter into a checkpoint"
_NO_SPECULATION = "speculative decoding is not in this release; leave it out"
_NO_COMPILE = "what torch.compile would fuse are single kernels already; leave it out"
_NO_NODES = "one server runs on one machine in this release; use --tp for its GPUs"
_ONE_GRAMMAR = "grammars are compiled by llguidance; leave it out"
_NO_EXPERTS = "mixture-of-experts models are not in this release; use --tp"
_NO_SPARSITY = "sparse attention is not in this release; leave it out"

REFUSED = (
    _refused("--quantization", "one", "none", _NO_QUANTIZATION),
    _refused("--torchao-config", "one", "none", _NO_QUANTIZATION),
    _refused(
        "--quantization-param-path",
        "one",
        "none",
        "the KV cache is stored without scales; leave it out",
    ),
    _refused(
        "--trust-remote-code",
        "nothing",
        "",
        "code from a model repository is never run; leave the flag out",
    ),
    _refused(
        "--tokenizer-mode",
        "one",
        "auto",
        "only fast tokenizers are used; leave it out and give a model with a tokenizer.json",
    ),
    _refused(
        "--sampling-backend",
        "one",
        "auto pytorch",
        "flashinfer comes with a later release; use pytorch",
    ),
    _refused(
        "--triton-attention-num-kv-splits",
        "one",
        "8",
        "the triton back end chooses by batch size; leave it out",
    ),
    _refused(
        "--disable-cuda-graph-padding",
        "nothing",
        "",
        "batches are filled up to the next recorded size, by an eighth at most; use "
        "--disable-cuda-graph to run without graphs",
    ),
    _refused(
        "--cuda-graph-bs",
        "many",
        "",
        "sizes are chosen so that little is filled up; use --cuda-graph-max-bs for the largest",
    ),
    _refused(
        "--dp-size --data-parallel-size --dp",
        "one",
        "1",
        "one server runs one copy of the model in this release; start one server for each "
        "group of GPUs (--base-gpu-id) and put a load balancer before them",
    ),
    _refused(
        "--load-balance-method",
        "one",
        "round_robin",
        "one server runs one copy of the model in this release; leave it out",
    ),
    _refused(
        "--enable-dp-attention",
        "nothing",
        "",
        "one server runs one copy of the model in this release; leave it out",
    ),
    _refused("--nnodes", "one", "1", _NO_NODES),
    _refused("--node-rank", "one", "0", _NO_NODES),
    _refused("--dist-init-addr --nccl-init-addr --nccl-init", "one", "", _NO_NODES),
    _refused("--expert-parallel-size --ep-size", "one", "1", _NO_EXPERTS),
    _refused("--enable-ep-moe", "nothing", "", _NO_EXPERTS),
    _refused("--enable-torch-compile", "nothing", "", _NO_COMPILE),
    _refused("--torch-compile-max-bs --max-torch-compile-bs", "one", "32", _NO_COMPILE),
    _refused("--lora-paths", "many", "", _NO_LORA),
    _refused("--max-loras-per-batch", "one", "8", _NO_LORA),
    _refused("--lora-backend", "one", "triton", _NO_LORA),
    _refused("--grammar-backend", "one", "llguidance", _ONE_GRAMMAR),
    _refused("--speculative-algorithm", "one", "none", _NO_SPECULATION),
    _refused(
        "--speculative-draft-model-path --speculative-num-steps --speculative-num-draft-tokens "
        "--speculative-eagle-topk",
        "one",
        "",
        _NO_SPECULATION,
    ),
    _refused(
        "--cpu-offload-gb",
        "one",
        "0",
        "weights are not kept in host memory in this release; use --tp or a smaller model",
    ),
    _refused("--log-level-http", "one", "", "there is one log level for all; use --log-level"),
    _refused("--show-time-cost", "nothing", "", "step times are in --trace-steps FILE; use that"),
    _refused(
        "--prefill-only-one-req",
        "nothing",
        "",
        "prompts share steps up to --chunked-prefill-size tokens; lower that instead",
    ),
    _refused(
        "--num-continuous-decode-steps",
        "one",
        "1",
        "scheduling overlaps the device, so one step at a time costs nothing; leave it out",
    ),
    _refused(
        "--disable-nan-detection", "nothing", "", "NaN logits are always detected; leave it out"
    ),
    _refused(
        "--enable-flashinfer-mla",
        "nothing",
        "",
        "multi-head latent attention is not in this release; leave it out",
    ),
    _refused(
        "--enable-custom-logit-processor",
        "nothing",
        "",
        "a request cannot bring code; use logit_bias in its sampling parameters",
    ),
    _refused(
        "--return-hidden-states",
        "nothing",
        "",
        "hidden states are not returned in this release; leave it out",
    ),
    _refused(
        "--delete-ckpt-after-loading",
        "nothing",
        "",
        "the server deletes no files; remove the checkpoint yourself",
    ),
    _refused(
        "--enable-memory-saver",
        "nothing",
        "",
        "GPU memory is not given back while serving in this release; leave it out",
    ),
    _refused(
        "--enable-nccl-nvls",
        "nothing",
        "",
        "set the environment variable NCCL_NVLS_ENABLE=1 instead",
    ),
    _refused(
        "--enable-hierarchical-cache",
        "nothing",
        "",
        "the KV cache lives on the device only in this release; leave it out",
    ),
    _refused("--enable-double-sparsity", "nothing", "", _NO_SPARSITY),
    _refused(
        "--ds-channel-config-path --ds-heavy-channel-num --ds-heavy-token-num "
        "--ds-heavy-channel-type --ds-sparse-decode-threshold",
        "one",
        "",
        _NO_SPARSITY,
    ),
)

OF_VLLM = {
    "--max-model-len": "it is called --context-length here",
    "--max-num-seqs": "it is called --max-running-requests here",
    "--max-num-batched-tokens": "it is called --chunked-prefill-size here",
    "--gpu-memory-utilization": "it is called --mem-fraction-static here",
    "--enforce-eager": "it is called --disable-cuda-graph here",
    "--block-size": "it is called --page-size here",
    "--enable-prefix-caching": "prefixes are always cached here; leave it out",
    "--no-enable-prefix-caching": "it is called --disable-radix-cache here",
    "--enable-chunked-prefill": "prompts are always computed in chunks here; leave it out",
    "--enable-auto-tool-choice": "tools may always be called here; see --tool-call-parser",
}
