"""Run hfquant's GGUF exports of SmolLM2 in llama.cpp: token ids, logits, and what Transformers reads back.

python benchmarks/run_llama_cpp.py --python LLAMA_PYTHON [--json FILE]

LLAMA_PYTHON is the interpreter of an environment of its own: pip install llama-cpp-python==0.3.36 (it compiles).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfquant import dequantize_model, export_model, quantize_model_ptq
from hfquant.cli.text import default_text, text_tokens


CASES = {
    "Q4_0": {"quantization_bits": 4, "group_size": 32, "embedding_bits": 8},
    "Q8_0": {"quantization_bits": 8, "quantization_type": "weight_only", "embedding_bits": 8},
}

SENTENCES = """All human beings are born free and equal in dignity and rights.|Alle Menschen sind frei und gleich an Würde
und Rechten geboren.|Tous les êtres humains naissent libres et égaux en dignité et en droits.|Todos los seres humanos nacen
libres e iguales en dignidad y derechos.|Все люди рождаются свободными и равными в своём достоинстве и правах.|Усі люди
народжуються вільними і рівними у своїй гідності та правах.|人人生而自由，在尊严和权利上一律平等。|すべての人間は、生まれながらにして自由であり、
尊厳と権利とについて平等である。|모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.|يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.|
כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.|सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।|
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ|Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.|
Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.|Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην
αξιοπρέπεια.|Wszyscy ludzie rodzą się wolni i równi pod względem swej godności.|Všichni lidé rodí se svobodní a sobě rovní.|
Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan.|ሰው፡ሁሉ፡ሲወለድ፡ነጻና፡በክብርና፡በመብትም፡እኩልነት፡ያለው፡ነው።|
def f(x):\n\treturn {"a": [1, 2.50, 0x1F], 'b': x**2}  # it's|  two  spaces,\ttabs\r\nand lines\n\n\nend |👩‍👩‍👧‍👦 🇨🇭 ½ ﷽ é e\u0301 \u200b|
I'll don't they've we'RE 12345678901234567890 3.14159 $1,000.00""".replace("|\n", "|").split("|")  # noqa: E501

WORKER = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, task, out = sys.argv[1:4]
job = json.load(open(task))
model = Llama(model_path=path, n_ctx=512, n_batch=512, n_threads=1, logits_all=True, verbose=False, seed=0)
ids = [model.tokenize(text.encode(), add_bos=False, special=False) for text in job["texts"]]
logits = []
for row in job["rows"]:
    model.reset()
    model.eval(row)
    logits.append(np.array(model.scores[: len(row)], dtype=np.float32))
answer = model.create_chat_completion(
    messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=24, temperature=0
)["choices"][0]["message"]["content"]
np.save(out, np.stack(logits))
json.dump({"ids": ids, "answer": answer}, open(out + ".json", "w"))
"""


def strings(count: int) -> list[str]:
    """Sentences of many languages, their parts and mixtures."""
    generator = random.Random(0)
    found = list(SENTENCES)
    while len(found) < count:
        parts = []
        for _ in range(generator.randint(1, 3)):
            sentence = generator.choice(SENTENCES)
            start = generator.randrange(len(sentence))
            parts.append(sentence[start : start + generator.randint(1, 60)])
        found.append(generator.choice(["", " ", "\n", " - ", "  "]).join(parts))
    return found[:count]


def measure(python: str, base: Path, name: str, work: Path, rows: torch.Tensor, texts: list[str]) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    quantize_model_ptq(model, progress=False, **CASES[name])
    model.save_pretrained(work / name)
    tokenizer.save_pretrained(work / name)
    export_model(work / name, "gguf", work / f"{name}-gguf", engine="llama.cpp", progress=False)
    (file,) = (work / f"{name}-gguf").glob("*.gguf")
    task, out = work / "task.json", str(work / f"{name}.npy")
    task.write_text(json.dumps({"texts": texts, "rows": rows.tolist()}))
    subprocess.run([python, "-c", WORKER, str(file), str(task), out], check=True)
    done = json.loads(Path(out + ".json").read_text())
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    floats = dequantize_model(model)
    again = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        own = floats(rows).logits
        difference = float((again(rows).logits - own).abs().max())
    served = torch.from_numpy(np.load(out)).double().log_softmax(-1)
    own = own.double().log_softmax(-1)
    return {
        "case": name,
        "file_megabytes": file.stat().st_size / 1e6,
        "strings": len(texts),
        "strings_with_equal_ids": sum(a == b for a, b in zip(done["ids"], expected, strict=True)),
        "max_logit_difference_read_by_transformers": difference,
        "mean_kl_llama_cpp": float((own.exp() * (own - served)).sum(-1).mean()),
        "answer": done["answer"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from demo_models import fetch_smollm2

    base, origin = fetch_smollm2()
    ids = text_tokens(AutoTokenizer.from_pretrained(base), default_text())[: 4 * 64].view(4, 64)
    with tempfile.TemporaryDirectory() as work:
        results = [measure(arguments.python, base, name, Path(work), ids, strings(1000)) for name in CASES]
    for result in results:
        print(json.dumps(result, indent=2, ensure_ascii=False), flush=True)
    if arguments.json:
        record = {
            "command": "benchmarks/run_llama_cpp.py",
            "model": origin,
            "torch": torch.__version__,
            "rows": results,
        }
        arguments.json.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
