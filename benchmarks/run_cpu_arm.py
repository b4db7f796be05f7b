"""One arm of ``cpu_models.py``: a process that holds one model and measures whenever it is told to.

It runs in the interpreter of any environment and needs of it only what its engine needs. The argument is a JSON object:
``engine`` (transformers, torchao, zentorch, bitsandbytes, llama.cpp, vllm, onnxruntime), ``path``, ``dtype``,
``compile``, ``threads``, ``vocabulary``, ``tasks`` and ``onnx``, a folder for exports. It prints ``{"ready": ...}``,
and for each line it reads, an object of seconds by task:

    decode       median over the tokens of one greedy continuation, each a forward of one token and its argmax
    prefill      a forward of many tokens, logits of the last one
    encode       a forward of a batch of sequences of one length
    layers       the linear layers of a decoder alone, in their order, on rows of random activations
    kernels      the same, less what torch takes to call them: the time of the same calls with no rows
"""

import contextlib
import ctypes
import functools
import json
import os
import statistics
import sys
import time
from typing import ClassVar


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
        self.model = kind.from_pretrained(spec["path"], **options).eval().requires_grad_(False)
        if spec["engine"] == "torchao":
            self.quantize_with_torchao(encoder)
        self.forward = self.model
        if spec.get("compile"):
            torch._dynamo.config.allow_unspec_int_on_nn_module = True
            # Nothing about the model changes: without this, checking that takes up to a fifth of a token's time.
            options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
            # Calls in C++ instead of Python, without a check of each result's sizes: a tenth of a token's time.
            options |= {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}
            if spec["engine"] == "zentorch":
                import zentorch  # noqa: F401 (it registers a backend)

                options = {"backend": "zentorch"}
            else:
                options = {"options": options}
            self.forward = torch.compile(self.model.forward, dynamic=False, **options)

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

    def kernels(self, rows, repeat):
        return self.layers(rows, repeat) - self.layers(0, repeat)

    def layers(self, rows, repeat):
        calls = self.layer_calls(rows)
        inputs = {size: self.torch.randn(1, rows, size, dtype=self.model.dtype) for size, _ in calls}

        def run(*given):
            found = (call(dict(zip(inputs, given, strict=True))[size]) for size, call in calls)
            return [tensor for out in found for tensor in (out if isinstance(out, tuple) else (out,))]

        with self.torch.inference_mode():
            # A graph that runs without Python, as ggml's does.
            graph, times = self.torch.jit.trace(run, tuple(inputs.values()), check_trace=False), []
            for _ in range(repeat):
                start = time.perf_counter()
                graph(*inputs.values())
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def layer_calls(self, rows):
        """Inputs and the ops that a packed model runs for its linear layers, with all that is in them; float layers."""
        torch = self.torch
        if "hfquant" not in sys.modules:
            linears = [m for m in self.model.modules() if hasattr(m, "in_features") and not hasattr(m, "embedding_dim")]
            return [(m.in_features, m) for m in linears]
        from hfquant.kernels.gated_mlp import NATIVE as NATIVE_MLP
        from hfquant.kernels.rotated_heads import NATIVE as NATIVE_HEADS
        from hfquant.nn.fused import SETTINGS, packed_arguments

        calls = []
        with torch.no_grad():
            for layer in self.model.model.layers:
                attention, mlp = layer.self_attn, layer.mlp
                size = vars(attention)[SETTINGS][0]
                angles = torch.ones(1, rows, size), torch.zeros(1, rows, size)
                *heads, layouts = packed_arguments((attention.q_proj, attention.k_proj, attention.v_proj))
                heads = [*heads, *angles, layouts, size]
                packed = [*packed_arguments((mlp.gate_proj, mlp.up_proj, mlp.down_proj)), vars(mlp)[SETTINGS]]
                calls.append((attention.q_proj.in_features, lambda x, given=heads: NATIVE_HEADS(x, *given)))
                calls.append((attention.o_proj.in_features, attention.o_proj))
                calls.append((mlp.gate_proj.in_features, lambda x, given=packed: NATIVE_MLP(x, *given)))
        return [*calls, (self.model.lm_head.in_features, self.model.lm_head)]

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


class Ggml:
    """The products of a model's linear layers in llama.cpp's library, in whichever of its layouts is the faster."""

    TYPES: ClassVar = {"Q4_0": 2, "Q8_0": 8}
    FLOAT32 = 0

    def __init__(self, spec):
        """Quantize random weights, each layer's its own, and build the graph for one row."""
        import llama_cpp
        import numpy

        folder = os.path.join(os.path.dirname(llama_cpp.__file__), "lib")
        # By the names that they know each other by: under another one a library would be loaded twice.
        self.base, self.cpu, self.all = (ctypes.CDLL(f"{folder}/libggml{n}.so.0") for n in ("-base", "-cpu", ""))
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        signatures = {
            "ggml_init": ([Parameters], pointer),
            "ggml_new_tensor_2d": ([pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64], pointer),
            "ggml_mul_mat": ([pointer, pointer, pointer], pointer),
            "ggml_new_graph": ([pointer], pointer),
            "ggml_build_forward_expand": ([pointer, pointer], None),
            "ggml_nbytes": ([pointer], size),
            "ggml_quantize_chunk": ([ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer], size),
            "ggml_backend_alloc_ctx_tensors_from_buft": ([pointer, pointer], pointer),
            "ggml_backend_buft_alloc_buffer": ([pointer, size], pointer),
            "ggml_backend_tensor_set": ([pointer, pointer, size, size], None),
            "ggml_backend_dev_supports_op": ([pointer, pointer], ctypes.c_bool),
            "ggml_backend_dev_backend_reg": ([pointer], pointer),
            "ggml_backend_reg_get_proc_address": ([pointer, ctypes.c_char_p], pointer),
            "ggml_backend_graph_compute": ([pointer, pointer], ctypes.c_int),
            "ggml_backend_cpu_init": ([], pointer),
            "ggml_backend_cpu_buffer_type": ([], pointer),
            "ggml_backend_cpu_set_n_threads": ([pointer, ctypes.c_int], None),
            "ggml_backend_dev_by_type": ([ctypes.c_int], pointer),
        }
        self.call = {}
        for name, (arguments, result) in signatures.items():
            function = next(getattr(lib, name) for lib in (self.base, self.cpu, self.all) if hasattr(lib, name))
            function.argtypes, function.restype = arguments, result
            self.call[name] = function
        self.backend = self.call["ggml_backend_cpu_init"]()
        self.call["ggml_backend_cpu_set_n_threads"](self.backend, spec["threads"])
        self.graphs = [
            self.build(spec["shapes"], (spec["type"], spec["head_type"]), numpy, laid_out) for laid_out in (False, True)
        ]

    def context(self):
        return self.call["ggml_init"](Parameters(1 << 20, None, True))

    def build(self, shapes, names, numpy, laid_out):
        kinds = [self.TYPES[names[0]]] * (len(shapes) - 1) + [self.TYPES[names[1]]]
        call, random = self.call, numpy.random.default_rng(0)
        activations = self.context()
        rows = {k: call["ggml_new_tensor_2d"](activations, self.FLOAT32, k, 1) for _, k in shapes}
        contexts = [self.context() for _ in shapes]
        tensors = [
            call["ggml_new_tensor_2d"](context, kind, k, n)
            for context, kind, (n, k) in zip(contexts, kinds, shapes, strict=True)
        ]
        graph = call["ggml_new_graph"](activations)
        products = [call["ggml_mul_mat"](activations, t, rows[k]) for t, (_, k) in zip(tensors, shapes, strict=True)]
        for product in products:
            call["ggml_build_forward_expand"](graph, product)
        plain = call["ggml_backend_cpu_buffer_type"]()
        for context, tensor, product in zip(contexts, tensors, products, strict=True):
            memory = self.buffer_type(tensor, product) if laid_out else plain
            call["ggml_backend_alloc_ctx_tensors_from_buft"](context, memory or plain)
        call["ggml_backend_alloc_ctx_tensors_from_buft"](activations, plain)
        for tensor, kind, (n, k) in zip(tensors, kinds, shapes, strict=True):
            values = random.standard_normal((n, k), dtype=numpy.float32)
            packed = numpy.empty(call["ggml_nbytes"](tensor), numpy.uint8)
            call["ggml_quantize_chunk"](kind, values.ctypes.data, packed.ctypes.data, 0, n, k, None)
            call["ggml_backend_tensor_set"](tensor, packed.ctypes.data, 0, packed.size)
        for k, row in rows.items():
            values = random.standard_normal(k, dtype=numpy.float32)
            call["ggml_backend_tensor_set"](row, values.ctypes.data, 0, values.nbytes)
        return graph

    def buffer_type(self, weight, product):
        """Memory where the library lays weights out anew, as llama.cpp does; ``None`` if it has none for these."""
        call, device = self.call, self.call["ggml_backend_dev_by_type"](0)
        registry = call["ggml_backend_dev_backend_reg"](device)
        address = call["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
        offered = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        buffer = ctypes.cast(weight, ctypes.POINTER(ctypes.c_void_p))  # the second field of a tensor
        for kind in iter(functools.partial(next, iter(offered)), None):
            buffer[1] = call["ggml_backend_buft_alloc_buffer"](kind, 0)
            fits = call["ggml_backend_dev_supports_op"](device, product)
            buffer[1] = None
            if fits:
                return kind
        return None

    def layers(self, rows, repeat):
        assert rows == 1
        times = {graph: [] for graph in self.graphs}
        for _ in range(repeat):
            for graph, taken in times.items():
                start = time.perf_counter()
                self.call["ggml_backend_graph_compute"](self.backend, graph)
                taken.append(time.perf_counter() - start)
        return min(map(statistics.median, times.values()))

    kernels = layers  # a graph calls next to nothing


class Parameters(ctypes.Structure):
    """``ggml_init_params``."""

    _fields_: ClassVar = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


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


ENGINES = {"llama.cpp": LlamaCpp, "ggml": Ggml, "vllm": Vllm, "onnxruntime": OnnxRuntime}


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
