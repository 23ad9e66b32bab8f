"""CIDEr, BLEU-4 and ROUGE-L by pycocoevalcap; METEOR, SPICE and the Penn Treebank tokenizer besides, which are Java.

Scores depend on the tokenizer, so that a score says which one it is of. The Treebank's is that of the COCO evaluation:
lower case, its punctuation left out. Without Java a regular expression does nearly the same; on plain captions the two
agree, on abbreviations, brackets and contractions they need not.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vlmfast.data.words import PUNCTUATION, words_of


def has_java() -> bool:
    return shutil.which("java") is not None


def tokenize(captions: Sequence[str], *, java: bool) -> list[str]:
    """Captions as lower-case words with spaces between them, without punctuation.

    Args:
        java: by the Penn Treebank tokenizer of the Stanford CoreNLP that pycocoevalcap holds.
    Raises:
        RuntimeError: Java failed.
    """
    lines = [" ".join(caption.split()) for caption in captions]
    words = _treebank(lines) if java else [words_of(line) for line in lines]
    return [" ".join(word for word in line if word not in PUNCTUATION) for line in words]


def caption_scores(
    generated: Sequence[str], references: Sequence[Sequence[str]], *, meteor: bool = False, spice: bool = False
) -> tuple[dict[str, float], list[float]]:
    """Scores of N captions, and the CIDEr of each.

    Args:
        generated: N tokenized captions.
        references: N lists of one or more tokenized captions.
        meteor: METEOR too, by Java.
        spice: SPICE too, by Java, with models that pycocoevalcap fetches when it is first used.
    Returns:
        "CIDEr", which is between 0 and 10, and "BLEU-4", "ROUGE-L", "METEOR" and "SPICE" in [0, 1]; N values of CIDEr.
        A CIDEr weighs words by how rare they are in the references at hand: figures of other data do not compare.
    Raises:
        ModuleNotFoundError: pycocoevalcap is not installed.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = {index: list(captions) for index, captions in enumerate(references)}
    found = {index: [caption] for index, caption in enumerate(generated)}
    cider, each = Cider().compute_score(truth, found)
    bleu, _ = Bleu(4).compute_score(truth, found, verbose=0)
    rouge, _ = Rouge().compute_score(truth, found)
    scores = {"CIDEr": float(cider), "BLEU-4": float(bleu[3]), "ROUGE-L": float(rouge)}
    if meteor:
        from pycocoevalcap.meteor.meteor import Meteor

        scores["METEOR"] = float(Meteor().compute_score(truth, found)[0])
    if spice:
        from pycocoevalcap.spice.spice import Spice

        with contextlib.redirect_stdout(io.StringIO()):
            scores["SPICE"] = float(Spice().compute_score(truth, found)[0])
    return scores, [float(value) for value in each]


def _treebank(lines: Sequence[str]) -> list[list[str]]:
    # Not pycocoevalcap's own wrapper, which writes into the folder that the package is installed in.
    import pycocoevalcap.tokenizer.ptbtokenizer as wrapper

    folder = Path(wrapper.__file__).parent
    command = ["java", "-cp", str(folder / wrapper.STANFORD_CORENLP_3_4_1_JAR)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # An empty line would be lost at the end.
    text = "".join(f"{line} .\n" for line in lines)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, encoding="utf-8")
    found = done.stdout.splitlines()
    if done.returncode or len(found) != len(lines):
        raise RuntimeError(f"PTBTokenizer: expected {len(lines)} lines, got {len(found)}: {done.stderr[-500:]}")
    return [line.split(" ") for line in found]
