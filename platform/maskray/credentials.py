"""What is secret, told by its name or its form, and texts without it.

Nothing here keeps secrets: they come from the environment, or in the URI of MLflow's store, and go to whom they are
meant for. All that is written, logged, shown or raised passes through `shown`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# Short ones as whole words only: there are BYPASS, PWD (the folder that one is in), AUTHOR and RAY_AUTH_MODE. Workers
# need MLFLOW_TRACKING_AUTH, which names a plugin.
_WORDS = (
    r"PASSW|PASSPHRASE|PASSCODE|(?<![A-Z0-9])PASS(?![A-Z0-9])|(?<=[_.?&-])PWD(?![A-Z0-9])"
    r"|TOKEN(?!IZ)|SECRET|KEY(?!BOARD|WORD)|CREDENTIAL|CREDS|CONNECTION_?STRING"
    r"|AUTHORIZATION|(?<![A-Z0-9])(?<!MLFLOW_TRACKING_)AUTH(?![\w.-])"
)
NAMED = re.compile(_WORDS, re.IGNORECASE)
"""Of a variable or option that is one, by its name."""

# A password may have @, / and : in it, as people paste it. What starts with a port is none.
_USER = r"//[^/@\s:]*"
_PASSWORD = r":(?!\d{1,5}(?:[/?#\s'\",;)\]]|$))\S*@"
_OPTION = rf"(?P<option>[?&][\w.-]*(?:{_WORDS})[\w.-]*=)[^&\s#'\"]+"
_WITH_PASSWORD = re.compile(_USER + _PASSWORD)
_WITH_USER = re.compile(r"//[^/\s]*@")
_WITH_OPTION = re.compile(_OPTION, re.IGNORECASE)


def are_in(text: str) -> bool:
    """Whether there is a URI in a text with credentials in it."""
    return any(form.search(text) for form in (_WITH_PASSWORD, _WITH_OPTION))


def shown(text: str) -> str:
    """A URI, or a text with some in it, without users, passwords, keys and tokens."""
    if "//" not in text and "=" not in text:
        return text
    for form in (_WITH_PASSWORD, _WITH_USER):
        text = form.sub("//***@", text)
    return _WITH_OPTION.sub(r"\g<option>***", text)


def all_shown(plain: Any) -> Any:
    """Plain data with each text in it as `shown` has it."""
    if isinstance(plain, dict):
        return {key: all_shown(value) for key, value in plain.items()}
    if type(plain) in (list, tuple):
        return type(plain)(map(all_shown, plain))
    return shown(plain) if isinstance(plain, str) else plain


@dataclass(frozen=True, repr=False)
class Hidden:
    """A text for whom it is meant, in settings that others show: as `shown` has it, wherever it is printed."""

    text: str

    def __repr__(self) -> str:
        return shown(self.text)
