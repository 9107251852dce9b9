"""Writes golden_media.json: what transformers 4.57.6 answers for the tasks on pictures that version 5 dropped.

    .venv/bin/python -m tests.parity.make_golden_media .peers/transformers4/bin/python

The tiny seeded models of the tests are saved here and answered by the interpreter given, in an environment of its own.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).with_name("golden_media.json")
QUESTIONS = ("what is this", "what color is the cat")
SEEDS = (1, 2)
CASES = {
    "vilt": "visual-question-answering",
    "blip_questions": "visual-question-answering",
    "swin2sr": "image-to-image",
    "blip_captions": "image-to-text",
    "vit_gpt2": "image-to-text",
}

# Runs on version 4, which knows nothing of this repository. Reads a folder with models and pictures, prints JSON.
ANSWER = """
import base64, json, sys
from pathlib import Path
import numpy as np
import transformers as hf
from PIL import Image

folder, cases, questions = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
pictures = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
classes = {"vilt": "ViltForQuestionAnswering", "blip_questions": "BlipForQuestionAnswering",
           "swin2sr": "Swin2SRForImageSuperResolution", "blip_captions": "BlipForConditionalGeneration",
           "vit_gpt2": "VisionEncoderDecoderModel"}
answers = {"transformers": hf.__version__}
for name, task in cases.items():
    where = folder / name
    model = getattr(hf, classes[name]).from_pretrained(where).eval()
    parts = {"image_processor": hf.AutoImageProcessor.from_pretrained(where, use_fast=False)}
    if task != "image-to-image":
        names = ["input_ids", "attention_mask"]
        parts["tokenizer"] = hf.PreTrainedTokenizerFast.from_pretrained(where, model_input_names=names)
    pipe = hf.pipeline(task, model=model, device="cpu", **parts)
    if task == "visual-question-answering":
        answers[name] = [[pipe(image=p, question=q, top_k=3) for q in questions] for p in pictures]
    elif task == "image-to-text":
        answers[name] = [pipe(p, max_new_tokens=8)[0]["generated_text"] for p in pictures]
        if name == "blip_captions":
            words = {"prompt": "a photo", "max_new_tokens": 8}
            answers[name + " a photo"] = [pipe(p, **words)[0]["generated_text"] for p in pictures]
    else:
        made = [np.asarray(pipe(p)) for p in pictures]
        answers[name] = [{"shape": m.shape, "pixels": base64.b64encode(m.tobytes()).decode()} for m in made]
print(json.dumps(answers))
"""


def main(python: str) -> None:
    from unit.tasks.media import tiny_media as tiny

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in SEEDS:
            tiny.picture(seed, 24, 16).save(folder / f"{seed}.png")
        for maker in CASES:
            (folder / maker).mkdir()
            getattr(tiny, maker)(folder / maker).save_pretrained(folder / maker)
            for path in (folder / maker).glob("preprocessor_config.json"):
                settings = json.loads(path.read_text())
                settings["image_processor_type"] = settings["image_processor_type"].removesuffix("Pil")
                path.write_text(json.dumps(settings))
        arguments = [python, "-c", ANSWER, name, json.dumps(CASES), json.dumps(QUESTIONS)]
        done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    answers = json.loads(done.stdout.splitlines()[-1])
    assert base64.b64decode(answers["swin2sr"][0]["pixels"])
    GOLDEN.write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1])
