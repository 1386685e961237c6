"""Boot parts, without starting anything but our own two little programs."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from bootkit import BUSYBOX, tiny_image
from treekit import tar_entry, tar_file

from diskmorph.convert.bridge import BuildOptions, build, container, grub, launcher, software, system, uki
from diskmorph.convert.bridge.initramfs import find_busybox, gzipped, is_static, make_initramfs
from diskmorph.convert.bridge.injected import Injector
from diskmorph.convert.bridge.kernels import _given_modules, _order
from diskmorph.convert.bridge.modules import ModuleFolder, dependency_lists
from diskmorph.convert.bridge.shelf import Shelf, given_file
from diskmorph.convert.options import ConvertOptions
from diskmorph.formats.cpio import read_cpio, write_cpio
from diskmorph.formats.errors import DiskmorphError, FormatError, OptionError, UnsupportedError
from diskmorph.formats.limits import Limits
from diskmorph.formats.source import BytesSource
from diskmorph.formats.tree import Tree, dir_node, file_node, link_node

from testkit import run

GUEST = Path(launcher.__file__).parent / "guest"


def tree_of(**files: str | bytes) -> Tree:
    tree = Tree()
    for name, text in files.items():
        data = text if isinstance(text, bytes) else text.encode()
        tree.put(name.replace("__", "/"), file_node(data, 0o755 if "sbin" in name else 0o644))
    return tree


class TestPrograms:
    @pytest.mark.parametrize(("name", "codes"), [("run", launcher.RUN_CODE), ("grow", launcher.GROW_CODE)])
    def test_code_is_what_its_source_assembles_to(self, tmp_path: Path, name: str, codes: dict[str, bytes]) -> None:
        run("as", "-o", tmp_path / "o", GUEST / f"{name}.amd64.s")
        run("objcopy", "-O", "binary", "-j", ".text", tmp_path / "o", tmp_path / "bin")
        assert (tmp_path / "bin").read_bytes() == codes["amd64"]

    def test_arguments_and_environment_are_exact(self, tmp_path: Path) -> None:
        words = (
            b"sh",
            b"-c",
            b'printf "<%s>" "$@"; echo "$A"; pwd',
            b"x",
            b"",
            b"a'b\"c",
            b"$HOME `id`",
            b"line\nbreak",
            b"\xff",
        )
        program = launcher.Program(
            (b"/no/such", b"/bin/sh"), words, (b"A=1 2\t$3", b"PATH=/bin"), b"/usr", os.getuid(), os.getgid()
        )
        (tmp_path / "run").write_bytes(launcher.run_program(program, "amd64"))
        (tmp_path / "run").chmod(0o755)
        done = subprocess.run([tmp_path / "run"], capture_output=True, check=True)
        assert done.stdout == b"<><a'b\"c><$HOME `id`><line\nbreak><\xff>1 2\t$3\n/usr\n"

    def test_a_missing_program_is_127(self, tmp_path: Path) -> None:
        program = launcher.Program((b"/no/such",), (b"such",), (), b"/", os.getuid(), os.getgid())
        (tmp_path / "run").write_bytes(launcher.run_program(program, "amd64"))
        (tmp_path / "run").chmod(0o755)
        done = subprocess.run([tmp_path / "run"], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (127, b"diskmorph: cannot run such\n")

    def test_other_architectures_are_refused_by_name(self) -> None:
        with pytest.raises(UnsupportedError, match="riscv64"):
            launcher.grow_program("riscv64")
        assert launcher.grow_program("arm64")[18] == 183


class TestCpio:
    def sample(self) -> Tree:
        tree = tree_of(a__b=b"content" * 99, sbin__x=b"program", empty=b"")
        tree.put("link", link_node(b"a/b"))
        tree.put("dir", dir_node(0o1777, 3, 4))
        return tree

    def test_others_read_it(self, tmp_path: Path) -> None:
        (tmp_path / "a.cpio").write_bytes(write_cpio(self.sample()))
        run("bsdtar", "-C", tmp_path, "-xf", tmp_path / "a.cpio")
        assert (tmp_path / "a/b").read_bytes() == b"content" * 99 and os.readlink(tmp_path / "link") == "a/b"
        assert (tmp_path / "sbin/x").stat().st_mode & 0o777 == 0o755

    def test_it_reads_what_others_write(self, tmp_path: Path) -> None:
        source = tmp_path / "s"
        (source / "d").mkdir(parents=True)
        (source / "d/file").write_bytes(b"x" * 1001)
        os.link(source / "d/file", source / "other")
        (source / "l").symlink_to("d/file")
        run("bsdtar", "--format", "newc", "-C", source, "-cf", tmp_path / "b.cpio", ".")
        tree = read_cpio(BytesSource((tmp_path / "b.cpio").read_bytes()))
        assert tree.find("d/file") is tree.find("other") and tree.find("l").read() == b"x" * 1001  # type: ignore[union-attr]

    def test_the_same_bytes_each_time(self) -> None:
        assert write_cpio(self.sample()) == write_cpio(self.sample())

    @pytest.mark.parametrize("cut", [0, 50, 111, 300])
    def test_cut_off(self, cut: int) -> None:
        with pytest.raises(FormatError, match=r"cut off|truncated"):
            read_cpio(BytesSource(write_cpio(self.sample())[:cut]))

    def test_damage(self) -> None:
        good = write_cpio(self.sample())
        for bad in (b"x" + good[1:], good[:6] + b"ZZZZZZZZ" + good[14:], good[:94] + b"FFFFFFFF" + good[102:]):
            with pytest.raises(FormatError):
                read_cpio(BytesSource(bad))
        with pytest.raises(FormatError, match="not allowed"):
            read_cpio(BytesSource(good.replace(b"a/b\0", b"../\0")))


def module(**fields: str) -> bytes:
    """An ELF object with a .modinfo section."""
    info = b"".join(f"{name.rstrip('0123')}={value}".encode() + b"\0" for name, value in fields.items())
    names = b"\0.modinfo\0.shstrtab\0"
    section = lambda name, at, size: struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 1, 0)  # noqa: E731
    at = 64 + len(info) + len(names)
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, at, 0, 64, 0, 0, 64, 3, 2)
    return head + info + names + bytes(64) + section(1, 64, len(info)) + section(10, 64 + len(info), len(names))


class TestModules:
    def folder(self, dep: bool = False) -> ModuleFolder:
        tree = Tree()
        put = lambda name, data: tree.put(f"kernel/{name}", file_node(data))  # noqa: E731
        put("a/disk-one.ko", module(depends="bus,core", alias0="pci:v1*", alias1="pci:v2*", softdep="pre: sum"))
        put("b/bus.ko.gz", gzip.compress(module(depends="core")))
        put("c/core.ko", module(depends=""))
        put("c/sum.ko", module(depends=""))
        tree.put("modules.builtin", file_node(b"kernel/fs/ext4/ext4.ko\n"))
        if dep:
            tree.put(
                "modules.dep",
                file_node(
                    b"kernel/a/disk-one.ko: kernel/b/bus.ko.gz kernel/c/core.ko\nkernel/b/bus.ko.gz: kernel/c/core.ko\nkernel/c/core.ko:\n"
                ),
            )
        return ModuleFolder(tree.root, "1.0")

    @pytest.mark.parametrize("dep", [False, True])
    def test_order_and_lists(self, dep: bool) -> None:
        picked = self.folder(dep).pick(["disk_one", "ext4", "nothing"])
        assert [m.name for m in picked.modules] == ["core", "bus", "sum", "disk_one"] and picked.missing == ["nothing"]
        needs, aliases = dependency_lists(picked)
        line = next(line for line in needs.splitlines() if line.startswith("kernel/a"))
        assert set(line.split()[1:]) == {"kernel/b/bus.ko", "kernel/c/core.ko", "kernel/c/sum.ko"}
        assert aliases == "alias pci:v1* disk_one\nalias pci:v2* disk_one\n"
        assert picked.modules[1].content == module(depends="core"), "it is stored decoded"

    def test_circles_end(self) -> None:
        tree = Tree()
        tree.put("a.ko", file_node(module(depends="b")))
        tree.put("b.ko", file_node(module(depends="a")))
        assert {m.name for m in ModuleFolder(tree.root, "1").pick(["a"]).modules} == {"a", "b"}

    @pytest.mark.parametrize("bad", [b"", b"\x7fELF\x02", module(depends="")[:100], b"\x7fELF\x02" + b"\xff" * 200])
    def test_damage(self, bad: bytes) -> None:
        tree = Tree()
        tree.put("a.ko", file_node(bad))
        with pytest.raises(FormatError, match=r"a\.ko"):
            ModuleFolder(tree.root, "1").pick(["a"])


class TestPackages:
    def test_deb(self, tmp_path: Path) -> None:
        root = tmp_path / "p"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN/control").write_text(
            "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m <m@x>\nDescription: d\n"
        )
        (root / "usr").mkdir()
        (root / "usr/file").write_bytes(b"deb")
        for codec in ("xz", "gzip", "none", "zstd"):
            run("dpkg-deb", "--root-owner-group", f"-Z{codec}", "-b", root, tmp_path / "p.deb")
            with software.open_software(tmp_path / "p.deb", Limits()) as tree:
                assert tree.find("usr/file").read() == b"deb"  # type: ignore[union-attr]

    def test_rpm_and_apk(self, tmp_path: Path) -> None:
        content = tree_of(usr__file=b"packed")
        header = b"\x8e\xad\xe8\x01" + bytes(4) + struct.pack(">II", 1, 3) + bytes(16) + b"abc"
        rpm = (
            b"\xed\xab\xee\xdb"
            + bytes(92)
            + header
            + bytes(-len(header) % 8)
            + header
            + gzip.compress(write_cpio(content))
        )
        (tmp_path / "a.rpm").write_bytes(rpm)
        control, data = tar_entry(".PKGINFO", b"pkgname = a\n"), tar_file(tar_entry("usr/file", b"packed"))
        (tmp_path / "a.apk").write_bytes(gzip.compress(control) + gzip.compress(data))
        for name in ("a.rpm", "a.apk"):
            with software.open_software(tmp_path / name, Limits()) as tree:
                assert tree.find("usr/file").read() == b"packed"  # type: ignore[union-attr]

    @pytest.mark.parametrize("bad", [b"!<arch>\nshort", b"!<arch>\n" + b"x" * 60, b"\xed\xab\xee\xdb" + bytes(200)])
    def test_damage(self, tmp_path: Path, bad: bytes) -> None:
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(FormatError):
            software.open_software(tmp_path / "bad", Limits())


class TestUnifiedKernelImage:
    def test_sections(self, tmp_path: Path) -> None:
        name, stub = uki.find_stub(Shelf(Tree(), (), Limits()), "amd64")
        image = uki.make_uki(
            stub, [(".osrel", b"ID=x\n"), (".cmdline", b"quiet"), (".linux", b"K" * 9001), (".initrd", b"I")]
        )
        (tmp_path / "uki.efi").write_bytes(image)
        assert name == "BOOTX64.EFI"
        for section, content in (
            (".osrel", b"ID=x\n"),
            (".cmdline", b"quiet"),
            (".linux", b"K" * 9001),
            (".initrd", b"I"),
        ):
            run("objcopy", "--dump-section", f"{section}={tmp_path}/out", tmp_path / "uki.efi", tmp_path / "copy")
            assert (tmp_path / "out").read_bytes()[: len(content)] == content, section

    @pytest.mark.parametrize("bad", [b"", b"MZ", b"MZ" + bytes(200), b"\x7fELF" + bytes(500)])
    def test_no_stub(self, bad: bytes) -> None:
        with pytest.raises(FormatError, match="EFI stub"):
            uki.make_uki(bad, [])

    def test_the_package_is_named(self) -> None:
        with pytest.raises(OptionError, match="systemd-boot-efi"):
            uki.find_stub(Shelf(Tree(), (), Limits()), "386")


class TestGrub:
    def test_bios_parts(self) -> None:
        code, core = grub.bios_parts(Shelf(Tree(), (), Limits()), "11111111-2222-3333-4444-555555555555", 2048)
        assert (
            len(code) == 440
            and code[0x5C:0x64] == struct.pack("<Q", 2048)
            and code[0x64] == 0xFF
            and code[0x66:0x68] == b"\x90\x90"
        )
        assert struct.unpack_from("<QHH", core, 500) == (2049, len(core) // 512 - 1, 0x820)

    def test_modules_of_the_tree_come_first(self) -> None:
        tree = Tree()
        for path in Path("/usr/lib/grub/i386-pc").iterdir():
            if path.suffix in (".mod", ".img", ".lst"):
                tree.put(f"usr/lib/grub/i386-pc/{path.name}", file_node(path.read_bytes()))
        tree.put("usr/lib/grub/i386-pc/boot.img", file_node(b"T" * 512))
        code, _ = grub.bios_parts(Shelf(tree, (), Limits()), "11111111-2222-3333-4444-555555555555", 2048)
        assert code[:10] == b"T" * 10

    def test_the_package_is_named(self) -> None:
        with pytest.raises(OptionError, match="grub-efi-arm64-bin"):
            grub.efi_program(Shelf(Tree(), (), Limits()), "u", "arm64")

    def test_configuration(self) -> None:
        text = grub.grub_config("UU-ID", [grub.Entry("It", "/boot/k", "/boot/i", "root=UUID=UU-ID quiet")])
        assert (
            "search.fs_uuid UU-ID root" in text
            and "linux /boot/k root=UUID=UU-ID quiet" in text
            and "initrd /boot/i" in text
        )


def test_versions_are_ordered_by_their_numbers() -> None:
    words = ["6." + "9" * 5000, "6.12", "6.1.\u00b2", "6.1.0-10-amd64", "6.1.0-9-amd64"]
    assert sorted(words, key=_order) == words[::-1]


def test_a_size_below_zero_does_not_lead_back() -> None:
    raw = bytearray(write_cpio(tree_of(a="x")))
    raw[54:62] = b"-%07X" % 112  # the file's size: its header, the name and padding are as long
    with pytest.raises(FormatError, match="below zero"):
        read_cpio(BytesSource(bytes(raw), "x.cpio"))


class TestUsers:
    tree = tree_of(
        etc__passwd="root:x:0:0::/root:/bin/sh\napp:x:7:8::/srv:/bin/sh\nbad:x:y:z::/:\nodd:x:\u00b2:0::/:\n",
        etc__group="eight:x:8:\nmore:x:9:app,root\nw:x:10:\n",
    )

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("", (0, 0, (9,), "/root")),
            ("app", (7, 8, (9,), "/srv")),
            ("7", (7, 8, (9,), "/srv")),
            ("app:w", (7, 10, (), "/srv")),
            ("4321:8765", (4321, 8765, (), "/")),
            ("99", (99, 0, (), "/")),
        ],
    )
    def test_resolved(self, text: str, found: tuple[object, ...]) -> None:
        assert container.resolve_user(self.tree, text) == found

    @pytest.mark.parametrize(
        "text",
        ["nobody", "app:nogroup", "\u00b2", "app:\u00b2", "9" * 5000, "4294967295"],
        ids=lambda text: ascii(text)[:9],
    )
    def test_unknown(self, text: str) -> None:
        with pytest.raises(OptionError, match="not in its"):
            container.resolve_user(self.tree, text)

    def test_program(self) -> None:
        tree = tree_of(etc__passwd="", etc__group="")
        tree.config = {"config": {"Entrypoint": None, "Cmd": ["app", "x"], "Env": ["PATH=/a:/b"], "User": "5"}}
        program = container.program_of(tree)
        assert program is not None and program.paths == (b"/a/app", b"/b/app") and program.arguments == (b"app", b"x")
        assert (program.uid, program.directory) == (5, b"/") and b"HOME=/" in program.environment

    @pytest.mark.parametrize(
        ("text", "found"), [("SIGTERM", "TERM"), ("15", "TERM"), ("quit", "QUIT"), ("SIGRTMIN+3", "37")]
    )
    def test_stop_signals(self, text: str, found: str) -> None:
        assert container.stop_signal(text) == found

    @pytest.mark.parametrize("text", ["x; rm -rf /", "RTMIN+31", "RTMIN+\u00b2"], ids=ascii)
    def test_no_signal(self, text: str) -> None:
        with pytest.raises(OptionError, match="STOPSIGNAL"):
            container.stop_signal(text)


class TestSystem:
    def test_inits(self) -> None:
        assert system.find_init(tree_of(sbin__init=b"x")) == "/sbin/init"
        alpine = tree_of(sbin__busybox=b"b")
        alpine.put("sbin/init", link_node(b"/sbin/busybox"))
        assert system.find_init(alpine) is None, "an init that has nothing to start"
        alpine.put("sbin/openrc", file_node(b"o", 0o755))
        assert system.find_init(alpine) == "/sbin/init"
        assert system.find_init(Tree()) is None

    def test_fstab(self) -> None:
        tree = tree_of(
            etc__fstab="# c\n/dev/sda1 / ext4 defaults 0 1\ntmpfs /tmp tmpfs size=1g 0 0\nUUID=x /boot ext4 d 0 2\n/dev/sdb1 /srv xfs d 0 2\n"
        )
        assert system.fstab_text(tree, "RR", "AB-CD") == (
            "UUID=RR / ext4 defaults,errors=remount-ro 0 1\nUUID=AB-CD /boot/efi vfat noauto,umask=0077 0 0\ntmpfs /tmp tmpfs size=1g 0 0\n"
        )

    def put(self, tree: Tree, **more: object) -> Tree:
        inject = Injector(tree)
        system.put_common(inject, tree, more.get("hostname"), more.get("keys", ()), "fstab\n", 5)  # type: ignore[arg-type]
        notes: list[str] = []
        system.put_distribution(inject, tree, notes, 5)
        inject.finish(5)
        return tree

    def test_keys_and_name(self, tmp_path: Path) -> None:
        (tmp_path / "k.pub").write_text("# me\nssh-rsa BBBB b\n")
        tree = self.put(tree_of(root___x=b""), hostname="web-1", keys=("ssh-ed25519 AAAA me", str(tmp_path / "k.pub")))
        node = tree.find("root/.ssh/authorized_keys")
        assert (
            node is not None and node.read() == b"ssh-ed25519 AAAA me\nssh-rsa BBBB b\n" and node.mode & 0o777 == 0o600
        )
        assert tree.find("root/.ssh").mode & 0o777 == 0o700 and tree.find("etc/hostname").read() == b"web-1\n"  # type: ignore[union-attr]

    def test_bad_words(self, tmp_path: Path) -> None:
        (tmp_path / "k").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
        for more in ({"hostname": "a b"}, {"hostname": ""}, {"keys": ("nonsense",)}, {"keys": (str(tmp_path / "k"),)}):
            with pytest.raises(OptionError):
                self.put(Tree(), **more)

    def test_systemd(self) -> None:
        tree = self.put(
            tree_of(
                usr__lib__systemd__systemd=b"",
                usr__lib__systemd__system__systemd_networkd_service=b"",
                **{"usr__lib__systemd__system__systemd-networkd.service": b""},
            )
        )
        assert tree.find("etc/machine-id").read() == b"uninitialized\n"  # type: ignore[union-attr]
        assert b"DHCP=yes" in tree.find("etc/systemd/network/80-dhcp.network").read()  # type: ignore[union-attr]
        link = tree.find("etc/systemd/system/multi-user.target.wants/systemd-networkd.service", follow=False)
        assert link is not None and link.target == b"/usr/lib/systemd/system/systemd-networkd.service"

    def test_openrc(self) -> None:
        tree = tree_of(
            etc__inittab="::sysinit:/sbin/openrc sysinit\n#ttyS0::respawn:/sbin/getty\n", etc__network__x=b""
        )
        tree.put("etc/init.d/networking", file_node(b"", 0o755))
        tree.put("etc/runlevels/boot", dir_node())
        self.put(tree)
        assert b"\nttyS0::respawn:/sbin/getty -L ttyS0 115200 vt100\n" in tree.find("etc/inittab").read()  # type: ignore[union-attr]
        assert tree.find("etc/runlevels/boot/networking") is not None


class TestInitramfs:
    def test_static_or_not(self) -> None:
        assert is_static(given_file(BUSYBOX, "x"), "amd64") and not is_static(given_file(BUSYBOX, "x"), "arm64")
        assert not is_static(given_file(Path(shutil.which("ls") or ""), "x"), "amd64")
        assert not is_static(file_node(b"#!/bin/sh\n"), "amd64") and not is_static(file_node(b"\x7fELF"), "amd64")
        assert find_busybox(Shelf(Tree(), (), Limits()), "arm64") is None

    def test_content(self) -> None:
        node = given_file(BUSYBOX, "x")
        picked = TestModules().folder().pick(["disk_one"])
        data = make_initramfs(node, picked, "1.0", "amd64", uuid="UU", init="/sbin/init", mode="ro")
        tree = read_cpio(BytesSource(gzip.decompress(data)))
        assert b"UUID='UU'" in tree.find("init").read() and tree.find("lib/modules/1.0/kernel/c/core.ko") is not None  # type: ignore[union-attr]
        assert tree.find("dev/console").rdev == (5, 1)  # type: ignore[union-attr]
        assert data == make_initramfs(node, picked, "1.0", "amd64", uuid="UU", init="/sbin/init", mode="ro")
        assert gzipped(b"x")[4:8] == bytes(4), "no time in it"

    def test_scripts_are_shell(self) -> None:
        for path in GUEST.glob("*.sh"):
            subprocess.run([BUSYBOX, "sh", "-n", path], check=True)


class TestWhatIsMissing:
    options = BuildOptions(convert=ConvertOptions(sync=False))

    def test_kernel(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match=r"no kernel.*--kernel"):
            build(tiny_image(tmp_path / "t.tar"), tmp_path / "d.raw", options=self.options)
        assert not (tmp_path / "d.raw").exists()

    @pytest.mark.parametrize("content", [b"", b"no kernel" * 100, b"!<arch>\n"])
    def test_bad_kernel(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "vmlinuz").write_bytes(content)
        with pytest.raises(DiskmorphError, match="vmlinuz"):
            build(
                tiny_image(tmp_path / "t.tar"),
                tmp_path / "d.raw",
                options=replace(self.options, kernel=tmp_path / "vmlinuz"),
            )

    def test_modules(self, tmp_path: Path) -> None:
        for folder, problem in ((tmp_path / "none", "no directory"), (tmp_path, "no kernel modules")):
            with pytest.raises(OptionError, match=problem):
                _given_modules(Tree(), folder, "6.1.0")
        (tmp_path / "virtio_blk.ko").write_bytes(module(vermagic="5.4 SMP"))
        with pytest.raises(OptionError, match="not those of the kernel"):
            _given_modules(Tree(), tmp_path, "6.1.0")
        (tmp_path / "virtio_blk.ko").write_bytes(module(vermagic="6.1.0 SMP"))
        assert _given_modules(Tree(), tmp_path, "6.1.0").version == "6.1.0"
