"""The questions of CA-MER and EmotionTalk."""

from mmemo.evaluation.elsewhere.lmms_tasks import docs_of

ca_mer = docs_of("eval/ca_mer.py", "emotion")
emotiontalk = docs_of("eval/emotiontalk_conflict.py", "emotion")
