"""The encoder all-MiniLM-L6-v2 in INT8: similarity of sentence pairs, float32 against three kinds of INT8.

make demo-encoder          (or: python examples/demo_encoder.py)
"""

import copy
import tempfile
from pathlib import Path

import torch
from demo_models import fetch_minilm
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from hfquant import quantize_model_ptq
from hfquant.evaluation.compare import sentence_similarity


PAIRS = [
    ("A man is playing a guitar.", "Someone plays an instrument."),
    ("A man is playing a guitar.", "The stock market fell on Monday."),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("The cat sleeps on the sofa.", "The dog barks at the postman."),
    ("How do I reset my password?", "I forgot my login credentials."),
    ("How do I reset my password?", "What is the weather in Lisbon?"),
    ("The meeting was moved to Friday.", "They rescheduled the meeting."),
    ("She bought three red apples.", "He sold his old bicycle."),
]

CALIBRATION = [
    "The committee will decide next week whether the plan goes ahead.",
    "Two children are running through a park with a brown dog.",
    "Install the package, then restart the service and check the log.",
    "Prices rose by four percent in the third quarter, the bank said.",
    "What time does the last train to the airport leave?",
    "A woman slices an onion in a small kitchen.",
    "The function returns an empty list when nothing matches.",
    "I would rather walk than wait for another bus in the rain.",
]

TYPES = ("weight_only", "dynamic", "static")


def quantized(model, tokenizer, quantization_type: str):
    batches = [dict(tokenizer(sentence, return_tensors="pt")) for sentence in CALIBRATION]
    data = batches if quantization_type == "static" else None
    return quantize_model_ptq(
        copy.deepcopy(model), quantization_bits=8, quantization_type=quantization_type, calibration_data=data
    )


def saved_bytes(model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def main(smoke: bool = False) -> None:
    if smoke:
        model, tokenizer, origin = tiny_encoder(), ByteTokenizer(), "a random model"
    else:
        source, origin = fetch_minilm()
        model, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    print(f"all-MiniLM-L6-v2 from {origin}")
    models = {"float32": model} | {f"INT8 {kind}": quantized(model, tokenizer, kind) for kind in TYPES}
    similarity = {name: sentence_similarity(each, tokenizer, PAIRS) for name, each in models.items()}
    table = Table(title="cosine similarity of sentence pairs")
    for column in ("pair", *models):
        table.add_column(column, justify="left" if column == "pair" else "right")
    for row, pair in enumerate(PAIRS):
        table.add_row(" / ".join(pair), *(f"{float(values[row]):.3f}" for values in similarity.values()))
    largest = [float((values - similarity["float32"]).abs().max()) for values in similarity.values()]
    table.add_row("largest difference", *(f"{value:.3f}" for value in largest))
    table.add_row("file size", *(f"{saved_bytes(each) / 1e6:.1f} MB" for each in models.values()))
    Console(width=130).print(table)
    assert max(largest) < 0.1


class ByteTokenizer:
    """Bytes as tokens, for the smoke run."""

    def __call__(self, text, return_tensors: str, **_):
        texts = [text] if isinstance(text, str) else text
        rows = [torch.tensor(list(each.encode()[:32])) for each in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Batch(input_ids=ids, attention_mask=(ids > 0).long())


class Batch(dict):
    def to(self, device):
        return Batch({key: value.to(device) for key, value in self.items()})


def tiny_encoder() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return BertModel(config).eval()


if __name__ == "__main__":
    main()
