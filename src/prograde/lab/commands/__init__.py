"""Commands that are not studies. A line here adds a command; its class holds the options."""

from prograde.lab.commands.inspect import Inspect
from prograde.lab.commands.launch import Launch
from prograde.lab.commands.list import List
from prograde.lab.commands.replay import Replay
from prograde.lab.commands.report import ReportCommand

COMMANDS = {
    "report": ReportCommand,
    "list": List,
    "launch": Launch,
    "replay": Replay,
    "inspect": Inspect,
}
