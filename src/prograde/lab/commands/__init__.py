"""The commands that are no studies. One line adds a command; the class is its options."""

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
