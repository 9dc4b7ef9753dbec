"""Words tell whether a cue is heard or seen, in English and Chinese; some tell nothing."""

from __future__ import annotations

import pytest

from mmemo.answers.cue_channels import guess_channel

HEARD = (
    "sobbing; shouting; laughter; sighs heavily; tremble in the voice; high pitch; "
    "low loudness; fast pace; long pauses; shaky breath; flat tone; background music; "
    "applause; crying aloud; crying loudly; loud crying; sound of crying; raised voice; "
    "voice cracks; quivering voice; tearful voice; smile in her voice; whimpering; hiccups; "
    "stuttering; monotone delivery; slow speech rate; rapid speech; long silence; door slam; "
    "dog barking; traffic noise; white noise; heavy breathing; gasping; panting; giggles; "
    "muffled sobs; speaks quickly; talks fast; low ending; high range; high breath; "
    "low rate; rising intonation; stressed syllables; trembling tone; sniffling; "
    "clears her throat; screams; yelled; laughs loudly; hushed whisper; mumbled words; "
    "nasal timbre; hoarseness; choked-up voice; phone ringing; bird chirping; "
    "siren in the distance; breathlessness; wailing; soft-spoken; pitch variation; "
    "louder at the end; 抽泣; 声音颤抖; 语速很快; 哭声; 大声喊叫; 叹了口气; 背景音乐; "
    "音调升高; 停顿较多; 笑声; 呼吸急促; 哽咽; "
    "语气低沉; 嗓音沙哑; 歎氣; 聲音發抖; 尖叫; 哭腔; 掌声; mean F0 of 220 Hz; vocal fry; "
    "sarcastic tone; "
    "bright laughter; shrieking; grunts; humming; echo in the room"
)
SEEN = (
    "inner brows raised; AU12; AU 4; lip corner puller; tears; tear-filled eyes; teary eyes; "
    "smiling; wide smile; gaze averted; downcast eyes; crossed arms; hand gestures; "
    "slumped posture; bright light; warm light; a cap; rain in the window; "
    "sun in the window; red shirt; blue wall; clenched jaw; clenched fists; trembling hands; "
    "trembling lips; quivering chin; crying face; nodding; shaking head; shakes his head; "
    "head turned left; leaning forward; fidgeting; blinking; furrowed brow; frowning; "
    "wide-eyed; tight-lipped; pale skin; blushing; glasses; looks away; looking down; "
    "facial tension; visible sweat; nose wrinkled; jaw dropped; cheeks raised; "
    "lids tightened; shrugs; teeth bared; pacing back and forth; dark room; curtains; "
    "skin tone; camera zooms in; curled lip; upper lids raised; lips parted; "
    "lip corners down; mouth open; open mouth; wiping tears; covers face with hands; "
    "stiff body; turned away from the camera; staring; eyebrow flash; 皱眉; 嘴角上扬; 眼泪; "
    "眼神躲闪; "
    "双手颤抖; 低头; 面部表情僵硬; 红色外套; 明亮的灯光; 微笑; 流泪; 握紧拳头; 咬牙; 瞪大眼睛; "
    "戴帽子; 皺眉; 嘴角下垂; blink rate; "
    "mouth opens to speak; a lamp; a poster on the wall; brown hair"
)
UNKNOWN = (
    "crying; laughing; weeping; trembling; shaking; 哭; 笑; 颤抖; happy; anger; "
    "sobbing with tears; face and voice tense; elevated heart rate; says 'leave me'; "
    "mouth open and shouting; 哭泣; energetic; zzz"
)


@pytest.mark.parametrize(("cues", "channel"), [(HEARD, "audio"), (SEEN, "video"), (UNKNOWN, None)])
def test_the_fields_words_tell_the_channel(cues: str, channel: str | None) -> None:
    wrong = {cue: guess_channel(cue) for cue in cues.split("; ") if guess_channel(cue) != channel}
    assert wrong == {}


def test_capitals_blanks_and_apostrophes_change_nothing() -> None:
    for cue in ("Shaky  Voice", "SOBBING", "a smile in someone\u2019s voice", "\uff33ighs"):
        assert guess_channel(cue) == "audio"


def test_what_names_the_channel_decides_over_what_it_holds() -> None:
    assert guess_channel("tears") == "video"
    assert guess_channel("tears in the voice") == "audio"
    assert guess_channel("laughter") == "audio"
    assert guess_channel("laughter on the face") == "video"
    assert guess_channel("a tense face and voice") is None
