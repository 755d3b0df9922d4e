"""A process that loads what strangers made, and says what that did: to the model, to its memory, and around it.

It is one process for many adapters, told of each by a line on its standard input: {"directory", "method", "verb"}. For
each it answers with a line: the error, how long and how much memory it took, what changed of the model, and what Python
did that an adapter may not make it do. Nothing can be hidden from the latter: it comes from `sys.addaudithook`, which
no hook can remove, and is for all threads.
"""

import _pickle
import contextlib
import ctypes
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import sysconfig
import time
import warnings

# What Python may do while an adapter is loaded, if it does it with the adapter's own files or its own library.
READING = {"open", "os.listdir", "os.scandir"}
WRITING = {"os.remove", "os.rename"}  # a journal of an interrupted save is finished
# What it may not do at all, with anything.
FORBIDDEN = (
    *("socket.", "subprocess.", "ctypes.", "marshal.", "pickle.", "shutil.", "urllib.", "http.", "ftplib.", "smtplib."),
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "os.putenv", "os.unsetenv"),
    *("os.chmod", "os.chown", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.utime", "os.kill"),
    *("os.chdir", "os.setxattr", "fcntl.ioctl", "sys.settrace", "sys.setprofile", "sqlite3.", "mmap.__new__"),
    *("tempfile.", "pty.", "syslog.", "telnetlib.", "webbrowser.", "glob.glob", "code.__new__", "builtins.input"),
)


class Watch:
    """What Python did, by its audit hooks, that loading an adapter in `directory` does not call for."""

    def __init__(self):
        self.directory, self.seen = None, None
        paths = sysconfig.get_paths()
        self.libraries = tuple(os.path.join(paths[key], "") for key in ("stdlib", "platstdlib", "purelib", "platlib"))
        self.libraries += (os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "fastpeft", ""),)
        sys.addaudithook(self.hook)

    @contextlib.contextmanager
    def on(self, *directories):
        self.directories, self.seen = tuple(os.path.realpath(each) for each in directories), []
        try:
            yield self.seen
        finally:
            self.seen = None

    def hook(self, event, arguments):
        if self.seen is None:
            return
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event}{arguments!r}"[:300])
        elif event in READING | WRITING and not isinstance(arguments[0], int):
            for path in arguments[: 2 if event == "os.rename" else 1]:
                self.check_path(event, path, arguments)
        elif event == "exec":
            self.check_code(event, arguments[0].co_filename)
        elif event == "compile":
            self.check_code(event, arguments[1])
        elif event == "import":
            file = arguments[1]
            if file is not None and not str(file).startswith(self.libraries):
                self.seen.append(f"import of {arguments[0]} from {file}")

    def check_path(self, event, path, arguments):
        name = os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes) else repr(path)
        writes = (
            event in WRITING or event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        inside = any(name == each or name.startswith(os.path.join(each, "")) for each in self.directories)
        if not inside and (writes or not name.startswith((*self.libraries, "/dev/null"))):
            self.seen.append(f"{event} of {name}")

    def check_code(self, event, filename):
        if not str(filename).startswith((*self.libraries, "<frozen ")):
            self.seen.append(f"{event} of {filename}")


def never(*args, **kwargs):
    raise SystemExit("a pickle was opened")


def close_pickle():
    """After the imports, which need it: nothing is to be unpickled any more, by whatever way."""
    import torch

    pickle.load = pickle.loads = pickle.Unpickler = pickle._Unpickler = torch.load = never
    torch.serialization.load = torch.serialization._load = torch.serialization._legacy_load = never


def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024


def forget_peak():
    """Where that is not permitted the peak is that of all adapters so far, which is no less."""
    with contextlib.suppress(PermissionError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


# What the watch must see; each is done for the harm's sake.
DEEDS = {
    "imports": lambda directory: (sys.path.insert(0, directory), __import__("modeling_evil")),
    "executes": lambda directory: exec("1 + 1"),
    "evaluates": lambda directory: eval("1 + 1"),
    "unpickles": lambda directory: _pickle.loads(_pickle.dumps(print)),
    "asks the network": lambda directory: socket.socket().connect(("127.0.0.1", 9)),
    "resolves a name": lambda directory: socket.getaddrinfo("localhost", 80),
    "reads elsewhere": lambda directory: open("/etc/passwd").close(),
    "lists elsewhere": lambda directory: os.listdir("/etc"),
    "writes elsewhere": lambda directory: open(directory + "-evil", "w").close(),
    "removes": lambda directory: os.remove(directory + "-evil"),
    "makes a directory": lambda directory: os.mkdir(os.path.join(directory, "owned")),
    "starts a program": lambda directory: subprocess.run(["true"]),
    "runs a shell": lambda directory: os.system("true"),
    "loads a library": lambda directory: ctypes.CDLL(None),
    "unpickles a file": lambda directory: pickle.load(io.BytesIO()),  # after which the process is another
}


def spoil(model):
    """One bit of one weight, and the right error."""
    import torch

    import fastpeft

    model.lm_head.weight.detach().view(torch.int32).view(-1)[:1].bitwise_xor_(1)
    raise fastpeft.AdapterFileError("refused")


def hoard(model):
    import fastpeft

    bytearray(os.urandom(1 << 20) * 300)
    raise fastpeft.AdapterFileError("refused")


def spin(model):
    import fastpeft

    start = time.process_time()
    while time.process_time() < start + 2.5:
        pass
    raise fastpeft.AdapterFileError("refused")


# What the tests must see besides.
SPOILS = {"changes a bit": spoil, "takes 300 megabytes": hoard, "takes 2.5 seconds": spin}


class Victim:
    """The models that adapters are loaded into, and what of them is compared."""

    def __init__(self):
        import torch
        import transformers  # noqa: F401

        import fastpeft
        from tests import models

        torch.set_num_threads(1)
        self.fastpeft, self.models, self.torch = fastpeft, models, torch
        self.watch = Watch()

    def model(self, family):
        """The family's tiny model; "small" is a LLaMA of half the width, as another base model is."""
        if family != "small":
            return self.models.tiny(family)
        import transformers

        settings = {**self.models.FAMILIES["llama"][1], "hidden_size": 16}
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **settings))

    def prepared(self, verb, method, family):
        """The model, and what is to be done with a directory."""
        from tests.hostile import SOUND

        fastpeft, model = self.fastpeft, self.model(family)
        if verb == "load":
            return model, lambda directory: fastpeft.load_adapter(model, directory)
        config = {**SOUND["lora"], "target_modules": ["o_proj"]} if verb == "beside" else SOUND[method]
        fastpeft.patch(model, fastpeft.get_peft_config(config))
        with self.torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.25)
        if verb == "beside":
            return model, lambda directory: fastpeft.load_adapter(model, directory, adapter_name="other")
        if verb == "restore":
            from fastpeft.restoring import restore_adapter

            return model, lambda directory: restore_adapter(model, directory)
        if verb == "hotswap":
            return model, lambda directory: fastpeft.hotswap_adapter(model, directory)
        if verb == "set":
            return model, lambda directory: fastpeft.set_peft_model_state_dict(model, self.raw(directory))
        if verb in SPOILS:
            return model, lambda directory: SPOILS[verb](model)
        return model, DEEDS[verb]

    def raw(self, directory):
        """A state dict as a program would hand it over that has read the file by itself."""
        from safetensors.torch import load_file

        return load_file(os.path.join(directory, "adapter_model.safetensors"))

    def own(self, model, name="default"):
        return {key: tensor.detach().clone() for key, tensor in self.fastpeft.adapter_state_dict(model, name).items()}

    def meet(self, directory, method, verb, family="llama", base=None):
        if verb == "auto":
            model = None
            act = self.fastpeft.AutoPeftModelForCausalLM.from_pretrained
        else:
            model, act = self.prepared(verb, method, family)
        before = None if model is None else self.models.snapshot(model)
        answer = {"error": None, "typed": None, "message": "", "changed": [], "loaded": None}
        found = None
        forget_peak()
        resident, start = memory("VmRSS"), time.process_time()
        printed = io.StringIO()
        with (
            self.watch.on(directory, *([base] if base else [])) as events,
            warnings.catch_warnings(record=True) as warned,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            warnings.simplefilter("always")
            try:
                found = act(directory)
            except Exception as error:
                answer["error"], answer["message"] = type(error).__name__, str(error)
                answer["classes"] = [each.__name__ for each in type(error).__mro__]
                answer["typed"] = isinstance(error, self.fastpeft.FastpeftError)
        answer["seconds"] = time.process_time() - start
        answer["megabytes"] = memory("VmHWM") - resident
        answer["events"] = list(dict.fromkeys(events))[:8]
        answer["warned"] = [str(each.message)[:200] for each in warned[:8]]
        answer["printed"] = printed.getvalue()[:500]
        if answer["error"] is not None:
            if model is not None:
                answer["changed"] = self.models.differences(before, self.models.snapshot(model))[:8]
        else:
            answer["loaded"] = self.as_the_file(model if model is not None else found, verb, before, directory)
        return answer

    def as_the_file(self, model, verb, before, directory):
        """Whether the adapter has the values of the file, and the base model those that it had; else what is wrong."""
        name = "other" if verb == "beside" else "default"
        own, wrong = self.own(model, name), []
        for key, tensor in self.raw(directory).items():
            if key not in own or not self.torch.equal(own[key], tensor.to(own[key].dtype)):
                wrong.append(f"{key} is not as the file has it")
        base = dict(model.named_parameters(remove_duplicate=False))
        for key, (*_, data) in ({} if before is None else before["tensors"]).items():
            now = base.get(key)
            if ".lora_" in key or "._fastpeft" in key or now is None or data is None or now.requires_grad:
                continue
            if not self.torch.equal(now.detach().clone().contiguous().view(-1).view(self.torch.uint8), data):
                wrong.append(f"{key} of the base model has changed")
        return wrong


def main():
    victim = Victim()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    closed = False
    for line in sys.stdin:
        task = json.loads(line)
        if task.pop("close", False) and not closed:
            close_pickle()
            closed = True
            answer = {}
        else:
            answer = victim.meet(**task)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
