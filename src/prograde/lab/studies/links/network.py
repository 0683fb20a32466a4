"""Machines that are joined by a slow link: network namespaces, and a relay between them.

Each machine is a network namespace with a TUN device. The relay holds the other ends of the
devices. A packet leaves its machine at the rate of the link, after the packets before it, and
arrives `delay` seconds later. Like a router, the relay drops a packet that would wait behind more
than `queue` bytes. Without a rate the machines are joined by a bridge instead, whose time is
negligible. Needs root, iproute2 and /dev/net/tun.
"""

import collections
import contextlib
import fcntl
import itertools
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass

PREFIX = "prograde"
MTU = 9000  # of both kinds of link; large, so that the relay has fewer packets


@dataclass(frozen=True)
class Link:
    """The link between machines: bits per second of each sender, and delay in seconds one way.

    Without a rate, it is a bridge.
    """

    rate: float | None = None
    delay: float = 0.0

    @property
    def queue(self) -> float:
        """Maximum number of waiting bytes: those of two round trips, but at least a few packets."""
        return max(16 * MTU, 4 * self.delay * (self.rate or 0) / 8)

    @property
    def name(self) -> str:
        """The rate, and the round-trip time."""
        if self.rate is None:
            return "unlimited"
        return f"{self.rate / 1e6:g} Mbit/s, {2e3 * self.delay:g} ms"


_networks = itertools.count()


def missing() -> str | None:
    """Says what this machine lacks for a network, or returns None if it lacks nothing."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "it must be started by root"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun"
    probe = f"{PREFIX}-probe-{os.getpid()}"
    try:
        ip("netns", "add", probe)
        ip("netns", "delete", probe)
    except FileNotFoundError:
        return "the program `ip` of iproute2 is not installed"
    except subprocess.CalledProcessError as error:
        return f"it cannot make network namespaces ({error.stderr.decode().strip()})"
    return None


def ip(*arguments: str) -> None:
    """Runs `ip` of iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def address(i: int) -> str:
    """Returns the address of a machine."""
    return f"10.77.0.{i + 1}"


class Network(contextlib.AbstractContextManager):
    """Machines on a link. At the end of the block, machines and their processes are removed."""

    def __init__(self, link: Link, machines: int):
        self.link, self.machines, self.relay = link, machines, None
        own = f"{PREFIX}-{os.getpid()}-{next(_networks)}"
        self.names, self.hub = [f"{own}-{i}" for i in range(machines)], f"{own}-hub"

    def __enter__(self) -> "Network":
        try:
            for i, name in enumerate(self.names):
                ip("netns", "add", name)
                # Gloo listens at the address of the host name
                os.makedirs(f"/etc/netns/{name}", exist_ok=True)
                with open(f"/etc/netns/{name}/hosts", "w") as hosts:
                    hosts.write(f"127.0.0.1 localhost\n{address(i)} {os.uname().nodename}\n")
                ip("-n", name, "link", "set", "lo", "up")
            self._bridge() if self.link.rate is None else self._relay()
            for i, name in enumerate(self.names):
                ip("-n", name, "address", "add", f"{address(i)}/24", "dev", "net0")
                ip("-n", name, "link", "set", "net0", "mtu", str(MTU), "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bridge(self) -> None:
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "add", "bridge0", "type", "bridge")
        ip("-n", self.hub, "link", "set", "bridge0", "mtu", str(MTU), "up")
        for i, name in enumerate(self.names):
            port = f"port{i}"
            peer = ["peer", "name", port, "netns", self.hub]
            ip("-n", name, "link", "add", "net0", "type", "veth", *peer)
            own = ["mtu", str(MTU), "master", "bridge0", "up"]
            ip("-n", self.hub, "link", "set", port, *own)

    def _relay(self) -> None:
        settings = {
            "names": self.names,
            "rate": self.link.rate,
            "delay": self.link.delay,
            "queue": self.link.queue,
        }
        self.relay = subprocess.Popen(
            [sys.executable, __file__, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.relay.stdout is not None
        if self.relay.stdout.readline() != "ready\n":
            raise RuntimeError("the relay did not start: is this root, and is there /dev/net/tun?")

    def inside(self, i: int, *program: str) -> list[str]:
        """Returns a command line that runs a program on a machine."""
        return ["ip", "netns", "exec", self.names[i], *program]

    def run(self, i: int, *program: str) -> str:
        """Runs a program on a machine; returns its output."""
        command = self.inside(i, *program)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def dropped(self) -> int:
        """Returns the number of packets that the relay has dropped."""
        if self.relay is None:
            return 0
        assert self.relay.stdin is not None
        assert self.relay.stdout is not None
        self.relay.stdin.write("\n")
        self.relay.stdin.flush()
        return json.loads(self.relay.stdout.readline())["dropped"]

    def close(self) -> None:
        """Ends the processes of the machines, and removes the machines."""
        for name in [*self.names, self.hub]:
            asked = ["ip", "netns", "pids", name]
            found = subprocess.run(asked, capture_output=True, text=True).stdout.split()
            for pid in found:  # all were started by this process, which owns the namespaces
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)
        if self.relay is not None:
            self.relay.kill()
            self.relay.communicate()
        for name in [*self.names, self.hub]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            with contextlib.suppress(OSError):
                os.unlink(f"/etc/netns/{name}/hosts")
            with contextlib.suppress(OSError):
                os.rmdir(f"/etc/netns/{name}")


_LISTENER = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
for _ in range(2):
    peer, _ = server.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if peer.recv(1) == b"e":
        for _ in range(30):
            peer.sendall(peer.recv(1))
    else:
        peer.recv(1 << 20)
        count, begin = 0, time.monotonic()
        while data := peer.recv(1 << 20):
            count += len(data)
        peer.sendall(str(8 * count / (time.monotonic() - begin)).encode())
    peer.close()
"""
_CALLER = """
import json, socket, sys, time
def call(word):
    peer = socket.create_connection((sys.argv[1], 5000))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.sendall(word)
    return peer
peer, trips = call(b"e"), []
for _ in range(30):
    begin = time.monotonic()
    peer.sendall(b"x")
    peer.recv(1)
    trips.append(time.monotonic() - begin)
peer = call(b"b")
for _ in range(int(sys.argv[2]) >> 16):
    peer.sendall(bytes(1 << 16))
peer.shutdown(socket.SHUT_WR)
found = {"round_trip_seconds": sorted(trips)[15], "longest_round_trip_seconds": max(trips)}
print(json.dumps(found | {"bits_a_second": float(peer.recv(99))}))
"""


def check(network: Network, size: int) -> dict[str, float]:
    """Measures a plain TCP connection: the round trip of a byte, and the rate of `size` bytes."""
    with subprocess.Popen(
        network.inside(1, sys.executable, "-c", _LISTENER, address(1)),
        stdout=subprocess.PIPE,
        text=True,
    ) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        return json.loads(network.run(0, sys.executable, "-c", _CALLER, address(1), str(size)))


def relay(names: list[str], rate: float, delay: float, queue: float) -> None:
    """Passes packets on until standard input is closed.

    Answers each line of input with the number of packets dropped so far.
    """
    devices = []
    for i, name in enumerate(names):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        tun, no_packet_information, set_interface = 0x0001, 0x1000, 0x400454CA
        given = f"pg{os.getpid()}_{i}"
        fcntl.ioctl(
            device,
            set_interface,
            struct.pack("16sH22x", given.encode(), tun | no_packet_information),
        )
        ip("link", "set", given, "netns", name)
        ip("-n", name, "link", "set", given, "name", "net0")
        devices.append(device)
    with contextlib.suppress(OSError):  # so that a packet does not wait for a processor
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    of_address = {
        bytes(map(int, address(i).split("."))): device for i, device in enumerate(devices)
    }
    free = dict.fromkeys(devices, 0.0)  # the time at which the line of each machine is free
    waiting = {device: collections.deque() for device in devices}
    dropped = 0
    poll = select.epoll()
    for descriptor in [0, *devices]:
        poll.register(descriptor, select.EPOLLIN)
    while True:
        now = time.monotonic()
        until = 1.0
        for line in waiting.values():
            while line and line[0][0] <= now:
                _, to, packet = line.popleft()
                with contextlib.suppress(OSError):
                    os.write(to, packet)
            if line:
                until = min(until, line[0][0] - now)
        for device, _ in poll.poll(until):
            if device == 0:
                if not sys.stdin.readline():
                    return
                print(json.dumps({"dropped": dropped}), flush=True)
                continue
            with contextlib.suppress(BlockingIOError):
                while packet := os.read(device, MTU + 64):
                    now = time.monotonic()
                    begin = max(now, free[device])
                    to = of_address.get(packet[16:20])
                    if packet[0] >> 4 != 4 or to is None:
                        continue
                    if (begin - now) * rate / 8 > queue:
                        dropped += 1
                        continue
                    free[device] = begin + len(packet) * 8 / rate
                    waiting[device].append((free[device] + delay, to, packet))


if __name__ == "__main__":
    relay(**json.loads(sys.argv[1]))
