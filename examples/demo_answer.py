"""Load any model and answer a prompt; knows nothing of hfquant. Prints one JSON line.

python examples/demo_answer.py MODEL PROMPT
"""

import json
import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, prompt = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": prompt}]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    started = time.perf_counter()
    out = model.generate(**batch, max_new_tokens=24, do_sample=False)
    seconds = time.perf_counter() - started
    new = out[0, batch["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    print(json.dumps({"answer": text, "tokens_per_second": new.numel() / seconds}))


if __name__ == "__main__":
    main()
