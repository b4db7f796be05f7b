"""One arm of ``cpu_models.py``: a process that holds one model and measures whenever it is told to.

It runs in the interpreter of any environment and needs of it only what its engine needs. The argument is a JSON object:
``engine`` (transformers, torchao, bitsandbytes, llama.cpp, vllm, onnxruntime), ``path``, ``dtype``, ``compile``,
``threads``, ``vocabulary``, ``tasks`` and ``onnx``, a folder for exports. It prints ``{"ready": ...}`` and then, for
each line it reads, an object of seconds by task:

    decode       median over the tokens of one greedy continuation, each a forward of one token and its argmax
    prefill      a forward of many tokens, logits of the last one
    encode       a forward of a batch of sequences of one length
"""

import contextlib
import json
import os
import statistics
import sys
import time


class Transformers:
    """A model of Transformers, eager or compiled on a static cache."""

    def __init__(self, spec):
        """Load the model, quantized by whatever ``engine`` says."""
        import torch
        from transformers import AutoModel, AutoModelForCausalLM

        self.torch, self.spec = torch, spec
        torch.set_num_threads(spec["threads"])
        options = {"dtype": getattr(torch, spec.get("dtype", "float32"))}
        if spec["engine"] == "bitsandbytes":
            options |= bitsandbytes_options(spec["bits"])
        encoder = "encode" in next(iter(spec["tasks"].values()))["kind"]
        kind = AutoModel if encoder else AutoModelForCausalLM
        self.model = kind.from_pretrained(spec["path"], **options).eval()
        if spec["engine"] == "torchao":
            self.quantize_with_torchao(encoder)
        self.forward = self.model
        if spec.get("compile"):
            torch._dynamo.config.allow_unspec_int_on_nn_module = True
            # Nothing about the model changes: without this, checking that takes up to a fifth of a token's time.
            options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
            self.forward = torch.compile(self.model.forward, dynamic=False, options=options)

    def quantize_with_torchao(self, encoder):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        if not encoder and self.model.config.tie_word_embeddings:  # its head is quantized as hfquant's is
            self.model.lm_head.weight = self.torch.nn.Parameter(self.model.lm_head.weight.detach().clone())
        quantize_(self.model, Int8DynamicActivationInt8WeightConfig())

    def ids(self, rows, count):
        generator = self.torch.Generator().manual_seed(0)
        return self.torch.randint(10, self.spec["vocabulary"], (rows, count), generator=generator)

    def cache(self, length):
        if not self.spec.get("compile"):
            return None
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=length)

    def decode(self, prompt, tokens):
        cache = self.cache(prompt + tokens + 8)
        with self.torch.inference_mode():
            out = self.model(self.ids(1, prompt), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, token, times = out.past_key_values, out.logits[:, -1:].argmax(-1), []
            for _ in range(tokens + 2):
                start = time.perf_counter()
                token = self.forward(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def prefill(self, prompt):
        ids, cache = self.ids(1, prompt), self.cache(prompt)
        with self.torch.inference_mode():
            start = time.perf_counter()
            self.forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - start

    def encode(self, batch, length, repeat):
        ids = self.ids(batch, length)
        with self.torch.inference_mode():
            times = []
            for _ in range(repeat):
                start = time.perf_counter()
                self.forward(input_ids=ids)
                times.append(time.perf_counter() - start)
        return statistics.median(times)


def bitsandbytes_options(bits):
    import torch
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {"quantization_config": BitsAndBytesConfig(**four), "device_map": "cpu"}


class LlamaCpp:
    """A GGUF file in llama.cpp; a token is evaluated, nothing is sampled."""

    def __init__(self, spec):
        """Load the file."""
        from llama_cpp import Llama

        threads = {"n_threads": spec["threads"], "n_threads_batch": spec["threads"]}
        self.model = Llama(model_path=spec["path"], n_ctx=1024, n_batch=512, n_ubatch=512, verbose=False, **threads)

    def decode(self, prompt, tokens):
        self.model.reset()
        self.model.eval(list(range(10, 10 + prompt)))
        times = []
        for i in range(tokens + 2):
            start = time.perf_counter()
            self.model.eval([100 + i])
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def prefill(self, prompt):
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(list(range(10, 10 + prompt)))
        return time.perf_counter() - start


class Vllm:
    """An export in vLLM's engine, offline; a token's time is the difference of a long and a short answer."""

    def __init__(self, spec):
        """Start the engine in this process."""
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        bound = "|".join(["0" if spec["threads"] == 1 else "0-1"])
        os.environ.update(settings | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": bound})
        from vllm import LLM

        self.model = LLM(
            spec["path"],
            dtype=spec["dtype"],
            max_model_len=1024,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            enforce_eager=not spec.get("compile"),
        )

    def answer(self, prompt, tokens):
        from vllm import SamplingParams

        rule = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self.model.generate([{"prompt_token_ids": list(range(10, 10 + prompt))}], rule, use_tqdm=False)
        return time.perf_counter() - start

    def decode(self, prompt, tokens):
        return (self.answer(prompt, tokens + 1) - self.answer(prompt, 1)) / tokens

    def prefill(self, prompt):
        return self.answer(prompt, 1)


class OnnxRuntime:
    """An encoder, exported to ONNX and quantized by ONNX Runtime's ``quantize_dynamic``, all in this process."""

    def __init__(self, spec):
        """Export and quantize once, and open what came out."""
        import numpy
        import onnxruntime
        import torch
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from transformers import AutoModel

        self.numpy, self.vocabulary = numpy, spec["vocabulary"]
        os.makedirs(spec["onnx"], exist_ok=True)
        file, small = spec["onnx"] + "/model.onnx", spec["onnx"] + "/model-int8.onnx"
        if not os.path.exists(small):
            model = AutoModel.from_pretrained(spec["path"], attn_implementation="eager").eval()
            model.config.return_dict = False
            ids, names = torch.randint(10, 1000, (2, 128)), ["input_ids", "attention_mask"]
            axes = {0: torch.export.Dim("batch", min=1, max=64)}
            torch.onnx.export(
                model, (ids, torch.ones_like(ids)), file, input_names=names, dynamo=True, dynamic_shapes=(axes, axes)
            )
            quantize_dynamic(file, small, per_channel=True, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec["threads"]
        self.session = onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])

    def encode(self, batch, length, repeat):
        ids = self.numpy.random.default_rng(0).integers(10, self.vocabulary, (batch, length))
        feed = {"input_ids": ids, "attention_mask": self.numpy.ones_like(ids)}
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            self.session.run(None, feed)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


ENGINES = {"llama.cpp": LlamaCpp, "vllm": Vllm, "onnxruntime": OnnxRuntime}


def main():
    """Load, say so, and measure once for every line."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print; answers alone go to the pipe
    engine = ENGINES.get(spec["engine"], Transformers)(spec)

    def measured():
        found = {}
        for name, task in spec["tasks"].items():
            arguments = {key: value for key, value in task.items() if key != "kind"}
            found[name] = getattr(engine, task["kind"])(**arguments)
        return found

    measured()  # warm-up, compilation included
    print(json.dumps({"ready": True}), file=answers, flush=True)
    with contextlib.suppress(BrokenPipeError):
        for _ in sys.stdin:
            print(json.dumps(measured()), file=answers, flush=True)


if __name__ == "__main__":
    main()
