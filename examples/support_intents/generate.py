"""Write train.jsonl and test.jsonl: messages to a smart-home shop, each with one of fifteen intents.

Every message is a wording with its slots filled, sometimes with a greeting, an ending or the slips of a hurried typist.
The last three wordings of each intent are kept for the test file, so test measures wordings that training never saw.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 20260401
TRAIN_PER_INTENT = 110
TEST_PER_INTENT = 16
HELD_OUT_WORDINGS = 3

SLOTS: dict[str, list[str]] = {
    "device": [
        "speaker",
        "radio",
        "camera",
        "door bell",
        "alarm clock",
        "lamp",
        "screen",
        "headset",
        "tablet",
        "watch",
    ],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "month": ["January", "March", "April", "June", "July", "September", "November", "December"],
    "number": ["4471", "20983", "5512", "77120", "3908", "61254", "1187", "90346"],
    "street": ["Park", "Hill", "Church", "Garden", "King", "Mill", "River", "Green"],
    "language": ["French", "German", "Spanish", "Italian", "Polish", "Dutch", "Turkish"],
    "country": ["France", "Japan", "England", "Italy", "India", "Mexico", "Canada", "Egypt"],
    "level": ["two", "three", "five", "six", "10", "20", "50"],
    "name": ["Ana", "Tom", "Lena", "Omar", "Priya", "Jack", "Mia", "Noor", "Paul", "Sofia", "Ivan", "Grace"],
}

WORDINGS: dict[str, list[str]] = {
    "track order": [
        "where is my order",
        "track order {number} for me",
        "what is the status of order {number}",
        "where is the {device} that I ordered",
        "has my order of the {device} left your shop",
        "I want to see where order {number} is now",
        "can you track my {device}",
        "when does my order {number} arrive",
        "my order {number} has not come, where is it",
        "I want to know the status of my {device} order",
        "is the {device} I ordered on the way",
        "look up order {number} and tell me where it is",
        "tell me where order {number} is",
        "can you track the {device} I ordered",
        "I want to know where my {device} order is now",
    ],
    "cancel order": [
        "please cancel order {number}",
        "cancel the {device} I bought",
        "I want to cancel my order",
        "can I still cancel order {number}",
        "I changed my mind, cancel the {device}",
        "I bought the wrong {device}, cancel my purchase",
        "how do I cancel what I ordered on {day}",
        "cancel the purchase of the {device} please",
        "I no longer want order {number}, cancel it",
        "I ordered two, cancel one {device}",
        "stop order {number}, I want to cancel",
        "help me cancel my {device} order",
        "I want to cancel the {device} I ordered",
        "how can I cancel order {number}",
        "please cancel my {device} purchase, I changed my mind",
    ],
    "change shipping address": [
        "I want to change my shipping address",
        "send the {device} to another address",
        "the shipping address of order {number} is wrong",
        "change the delivery address to {street} street",
        "we moved, I need to change the address",
        "can I change the address of order {number}",
        "update my shipping address to {street} street",
        "I typed the wrong delivery address",
        "help me correct the shipping address of the {device}",
        "my address is now {street} street, change it",
        "I have a new address, please change it for order {number}",
        "how do I change the address for the {device}",
        "please change the shipping address of order {number}",
        "I need to correct my delivery address",
        "change my address, we moved to {street} street",
    ],
    "get refund": [
        "I want a refund for the {device}",
        "give me my money back",
        "how do I get a refund",
        "I sent the {device} back and want a refund",
        "I want my money back for order {number}",
        "refund the {device} please",
        "I would like a refund of order {number} please",
        "how can I get a refund for the {device} I ordered",
        "can I be refunded for the {device}",
        "I need a refund of order {number}",
        "I am not happy with the {device}, I want my money back",
        "help me get my money back",
        "who can give me a refund for the {device}",
        "the {device} is broken, I want to be refunded",
        "can I get a refund for order {number}",
        "I want to get my money back for the {device}",
        "please refund order {number}",
    ],
    "check invoice": [
        "where can I see my invoice",
        "I want to look at the invoice of order {number}",
        "show me the invoice for the {device}",
        "I need to see the bill from {month}",
        "check the invoice from {month} please",
        "can I see the bill for my {device}",
        "I want to check invoice {number}",
        "find the invoice from {month} for me",
        "let me see my bills",
        "where is the invoice for the {device}",
        "take a look at invoice {number}",
        "I need my invoice for {month}",
        "I want to see the invoice for my {device}",
        "where can I find the bill from {month}",
        "please show me invoice {number}",
    ],
    "recover password": [
        "I forgot my password",
        "how do I reset my password",
        "I lost my password and need a new one",
        "help me recover my password",
        "my password is wrong, I cannot log in",
        "I do not remember my password",
        "I need to retrieve my password for the {device} app",
        "can I get a new password",
        "send me a link to set a new password",
        "the {device} app says my password is wrong",
        "what do I do if I forgot the password",
        "recover the password of the {device} app",
        "I forgot the password of my {device}",
        "help me get a new password",
        "I cannot remember the password of the {device} app",
    ],
    "delete account": [
        "delete my account",
        "I want to close my account",
        "how can I remove my account",
        "please delete my {device} account",
        "cancel my account for good",
        "I do not want an account any more",
        "close the account I made on {day}",
        "help me delete the account of the {device} app",
        "remove my account and all my data",
        "can you close my user account",
        "I want to delete my profile",
        "I sold my {device}, delete my account",
        "please close my account for good",
        "how do I delete the account of my {device}",
        "I want to remove my user account",
    ],
    "contact human agent": [
        "I want to talk to a human",
        "let me speak with an agent",
        "can I speak to a real person",
        "connect me with a human agent",
        "I need to talk with somebody",
        "is there a person I can talk to",
        "I want to chat with an agent",
        "put me through to a human agent",
        "get me someone to talk to",
        "can I talk with a real agent about my {device}",
        "I do not want a bot, give me a person",
        "how do I contact a human agent",
        "I want to speak to a human agent about my {device}",
        "let me talk with a real person",
        "can you connect me with an agent",
    ],
    "complaint": [
        "I want to make a complaint",
        "how can I file a complaint",
        "I have a complaint about the {device}",
        "I am not satisfied, I want to complain",
        "where do I send a complaint",
        "help me submit a complaint against your shop",
        "I need to file a complaint about the driver",
        "I want to lodge a complaint about order {number}",
        "take my complaint about the {device}",
        "there is a form for complaints, where is it",
        "I wish to complain about your service",
        "how can I complain about the {device}",
        "who do I complain to about your shop",
        "a complaint about the shop",
        "I want to file a complaint about the {device}",
        "where can I make a complaint about your shop",
        "how do I complain about the driver",
    ],
    "newsletter subscription": [
        "I want to subscribe to your newsletter",
        "how do I get the newsletter",
        "cancel my newsletter subscription",
        "stop the newsletter please",
        "sign me up for the newsletter",
        "I do not want the newsletter any more",
        "unsubscribe me from the newsletter",
        "I get your newsletter too often",
        "do you have a newsletter about the {device}",
        "help me sign up to the company newsletter",
        "I no longer want to receive your newsletter",
        "can I receive the {device} newsletter",
        "please sign me up to your newsletter",
        "how can I unsubscribe from the newsletter",
        "I want to receive the newsletter about the {device}",
    ],
    "sync device": [
        "sync the {device} with my phone",
        "how do I connect the {device} to my phone",
        "pair the {device} with my phone",
        "can you sync to my {device}",
        "link my phone to the {device}",
        "I want to connect my phone and the {device}",
        "my {device} does not sync with the phone",
        "help me pair my phone and the {device}",
        "connect to my {device}",
        "please sync with my {device} now",
        "unpair the {device} from my phone",
        "how can I link the {device} and the phone",
        "connect the {device} with my phone",
        "I want to pair the {device} and my phone",
        "can you help me sync my phone to the {device}",
    ],
    "reset settings": [
        "reset the {device} to factory settings",
        "go back to the original settings",
        "how do I reset the settings of the {device}",
        "put the {device} back to default settings",
        "restore the default settings",
        "I want to reset everything on the {device}",
        "please do a factory reset",
        "set all settings of the {device} back to default",
        "undo my changes and use the factory settings",
        "clear the settings of my {device}",
        "can you restore the original settings of the {device}",
        "a factory reset of the {device} please",
        "put everything back to factory settings",
        "how can I restore the default settings of the {device}",
        "I want to reset my {device} to the original settings",
    ],
    "change language": [
        "change the language to {language}",
        "can the {device} speak {language}",
        "set your language to {language}",
        "I want the {device} to talk in {language}",
        "switch the {device} from {language} to English",
        "use {language} as the language",
        "how do I change the language of the {device}",
        "make the {device} speak {language}",
        "I would like the menu in {language} language",
        "the language of the {device} should be {language}",
        "please talk in {language} now",
        "my {device} must speak {language} with me",
        "set the language of the {device} to {language}",
        "I want my {device} to speak {language}",
        "can you switch the language to {language}",
    ],
    "change volume": [
        "turn the volume up",
        "set the volume of the {device} to {level}",
        "make the {device} louder",
        "lower the volume of the {device}",
        "the volume is too high",
        "can you turn down the volume",
        "I need the volume at {level}",
        "change the volume of the {device}",
        "how do I turn up the volume of the {device}",
        "the {device} is too quiet, raise the volume",
        "put the volume to {level} please",
        "increase the sound volume of the {device}",
        "turn down the volume of the {device}",
        "please set the volume to {level}",
        "the volume of the {device} is too low",
    ],
    "plug type": [
        "what plug type do they use in {country}",
        "do I need a plug converter in {country}",
        "which plug works in {country}",
        "will my {device} plug fit the socket in {country}",
        "what kind of plug do I need for {country}",
        "are the sockets different in {country}",
        "can I use my {device} plug in {country}",
        "is a socket converter needed in {country}",
        "what type of plug is used in {country}",
        "do I need an adapter for the plug in {country}",
        "which type of socket do they have in {country}",
        "what plug should I take to {country}",
        "which plug type do I need in {country}",
        "do I need a socket adapter for my {device} in {country}",
        "what kind of plug is used in {country}",
    ],
}

GREETINGS = ["Hi, ", "Hello, ", "Hello there, ", "Good morning, ", "Hey, ", "Hi, {name} here, ", "Dear team, "]
ENDINGS = [" Thanks.", " Thank you!", " Can you help?", " Please advise.", " Best, {name}", " Thanks, {name}"]
SHORT_FORMS = {"please": "pls", "you": "u", "are": "r", "does not": "doesnt", "what is": "whats"}


def fill(text: str, rng: random.Random) -> str:
    """Replace each {slot} in `text` by one of its values."""
    return text.format_map({slot: rng.choice(values) for slot, values in SLOTS.items()})


def slip(text: str, rng: random.Random) -> str:
    """Swap or drop one letter inside a word of five letters or more; digits and short words stay as they are."""
    words = text.split(" ")
    long_words = [i for i, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    if not long_words:
        return text
    which = rng.choice(long_words)
    word = words[which]
    at = rng.randrange(1, len(word) - 2)
    if rng.random() < 0.5:
        words[which] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    else:
        words[which] = word[:at] + word[at + 1 :]
    return " ".join(words)


def make_message(wording: str, rng: random.Random) -> str:
    """Fill a wording and give it one of three manners: polite, terse or hurried."""
    core = fill(wording, rng)
    manner = rng.choice(["polite", "plain", "terse", "hurried"])
    if manner == "polite":
        greeting = rng.choice(GREETINGS)
        question = wording.split(" ")[0] in {"how", "what", "is", "can", "do", "does", "where", "why", "when", "will"}
        return fill(greeting, rng) + core + ("?" if question else ".") + fill(rng.choice(["", *ENDINGS]), rng)
    if manner == "plain":
        return core[0].upper() + core[1:] + rng.choice([".", "", "!"])
    if manner == "terse":
        return core.lower()
    for whole, short in SHORT_FORMS.items():
        core = core.replace(f"{whole} ", f"{short} ")
    return slip(core.lower(), rng)


def make_rows(held_out: bool, per_intent: int, taken: set[str], rng: random.Random) -> list[dict[str, object]]:
    """Make `per_intent` rows of every intent from the training or the held-out wordings; messages are all distinct."""
    rows: list[dict[str, object]] = []
    for intent, wordings in WORDINGS.items():
        usable = wordings[-HELD_OUT_WORDINGS:] if held_out else wordings[:-HELD_OUT_WORDINGS]
        made = 0
        while made < per_intent:
            message = make_message(usable[made % len(usable)], rng)
            if message.lower() not in taken:
                taken.add(message.lower())
                rows.append({"inputs": {"message": message}, "answer": intent})
                made += 1
    rng.shuffle(rows)
    return rows


def main() -> None:
    """Write both files beside this one."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    folder = Path(__file__).parent
    for name, held_out, per_intent in (("train", False, TRAIN_PER_INTENT), ("test", True, TEST_PER_INTENT)):
        rows = make_rows(held_out, per_intent, taken, rng)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
