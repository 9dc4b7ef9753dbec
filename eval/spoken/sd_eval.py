"""SD-Eval: spoken replies that should suit a speaker's emotion, accent, age or surroundings.

7,303 utterances, CC BY-NC 4.0; ``data/spoken/sd_eval.py`` says where to get them and how the folder
looks. BLEU-4, ROUGE-L and METEOR take the best of the five references. With a judge,
``--benchmark.judge.base_url=URL --benchmark.judge.model=NAME``, each reply is also rated from 1 to
10 by one who knows the words and what is heard; a reply without a readable rating is the worst and
is counted, where the released mean ends with an error.

The emotion part has 34 transcripts: always saying the commonest emotion of a transcript is right
for 74.5 % of it, without hearing anything. Read its numbers beside a text-only baseline.

    mmemo eval eval/spoken/sd_eval.py --data SD-Eval --model MODEL --option subset=emo
"""

from __future__ import annotations

import sys

from mmemo import content
from mmemo.answers.kinds import Text
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

ADAPTER = "data/spoken/sd_eval.py"
COLUMNS = ("task", "gold", "facts")
SUBSETS: dict[str, str] = content.load(f"{ADAPTER}:SUBSETS")
CRITERION = "how well the reply suits the speaker's {} and words, how natural and coherent it is."
TASKS = {
    name: Task(
        answers=Text(),
        question="Reply to the speaker in one or two sentences, as suits what you hear.",
        scorers=(
            use("text", metrics=["bleu", "rouge_l", "meteor"]),
            use("judge", criterion=CRITERION.format(what), low=1, high=10),
        ),
        slices=("info",),
    )
    for name, what in SUBSETS.items()
}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
