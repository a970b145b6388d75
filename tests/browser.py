"""A headless Chromium, told what to do over two pipes by its own protocol (--remote-debugging-pipe): no driver, no package."""
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a browser of its own. `events` holds what it reported: requests, exceptions, messages of the console."""

    def __init__(self, url: str, folder, width: int = 1280, dark: bool = False):
        to_browser, self.write = os.pipe()
        self.read, from_browser = os.pipe()
        high = os.dup2(to_browser, 1003), os.dup2(from_browser, 1004)       # out of the way of 3 and 4, where it listens and speaks
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec 3<&{high[0]} 4>&{high[1]}; exec "$@"', "bash", CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
             "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"], pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for descriptor in (to_browser, from_browser, *high):
            os.close(descriptor)
        self.buffer, self.number, self.session, self.events = b"", 0, {}, []
        [page] = [target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=url)
        while self.run("document.readyState") != "complete":
            time.sleep(0.05)

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            part = os.read(self.read, 2 ** 20)
            if not part:
                raise EOFError("the browser has ended")
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **parameters) -> dict:
        """One command of the protocol, and its answer."""
        self.number += 1
        os.write(self.write, json.dumps({"id": self.number, "method": method, "params": parameters, **self.session}).encode() + b"\0")
        while (message := self.receive()).get("id") != self.number:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def run(self, script: str):
        """The value of a piece of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def point(self, x: float, y: float) -> None:
        """Move the pointer there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9, "ArrowRight": 39, "ArrowLeft": 37}[key])

    def close(self) -> None:
        try:
            self.call("Browser.close")
        except (EOFError, BrokenPipeError):
            pass
        self.process.wait(20)
        os.close(self.read)
        os.close(self.write)
