"""A text for searches, and searches so short that they cost little."""

from pathlib import Path

TEXT = """
The road ran down from the mill to the water, and on both sides of it the hedges were white with
dust. Nobody had come by since the morning. An old woman sat before the door of the last house and
looked at the hills; she had sat there every evening for thirty years, and the people of the village
said that she waited for her son, who had gone to sea. "He will come when the apples are ripe," she
told the children, and the children laughed and ran away.

That evening a stranger came up the road with a bag over his shoulder. He stopped at the gate, took
off his hat, and asked whether there was a room to be had for the night. She did not answer at once.
She looked at his hands, which were brown and hard, and at his boots, and then into his face for a
long time. "There was a room," she said at last, "but the roof of it fell in, and I never had it
mended, because he who should have paid for it did not write." The man laid his bag on the wall.
"Then I will mend it," said he, "for I have learned the trade, and I am in no hurry to go on."
"""
SHORT = ("--sentences", "4", "--length", "24", "--dtype", "float32")


def text_file(folder: Path) -> str:
    """The path of a file with the text."""
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)
