"""The questions of EmoReAlM."""

from mmemo.evaluation.elsewhere.lmms_tasks import docs_of

reasoning_basic_audio = docs_of("eval/emorealm.py", "reasoning_basic_audio")
reasoning_basic_video = docs_of("eval/emorealm.py", "reasoning_basic_video")
modality_agreement = docs_of("eval/emorealm.py", "modality_agreement")
reasoning_stress_audio = docs_of("eval/emorealm.py", "reasoning_stress_audio")
reasoning_stress_video = docs_of("eval/emorealm.py", "reasoning_stress_video")
