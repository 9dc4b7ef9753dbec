"""The questions of CREMA-D."""

from mmemo.evaluation.elsewhere.lmms_tasks import docs_of

emotion = docs_of("eval/crema_d.py", "emotion")
voice = docs_of("eval/crema_d.py", "voice")
face = docs_of("eval/crema_d.py", "face")
