"""The questions of MER-UniBench."""

from mmemo.evaluation.elsewhere.lmms_tasks import docs_of

mer2023 = docs_of("eval/mer_unibench.py", "mer2023")
mer2024 = docs_of("eval/mer_unibench.py", "mer2024")
meld = docs_of("eval/mer_unibench.py", "meld")
iemocap = docs_of("eval/mer_unibench.py", "iemocap")
mosi = docs_of("eval/mer_unibench.py", "mosi")
mosei = docs_of("eval/mer_unibench.py", "mosei")
sims = docs_of("eval/mer_unibench.py", "sims")
simsv2 = docs_of("eval/mer_unibench.py", "simsv2")
ovmerdplus = docs_of("eval/mer_unibench.py", "ovmerdplus")
