"""Headers of Linux kernels and ramdisks.

Of Linux's own documents: x86, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header"; arm64,
arch/arm64/booting.rst; ramdisks, driver-api/early-userspace/buffer-format.rst. zboot is described by
drivers/firmware/efi/libstub/zboot-header.S.
"""

from __future__ import annotations

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, PaddedString, Struct

BOOT_HEADER_OFFSET = 0x1F1
BOOT_HEADER_END = 0x26C

# From byte 0x1f1 of the file. The comment is the first protocol version whose kernels have the field.
BOOT_HEADER = Struct(
    "setup_sects" / Int8ul,  # sectors of real-mode code behind the first; 0 means 4
    "root_flags" / Int16ul,  # mount the root read-only
    "syssize" / Int32ul,  # protected-mode code, in 16-byte paragraphs; 2.04
    "ram_size" / Int16ul,
    "vid_mode" / Int16ul,
    "root_dev" / Int16ul,
    "boot_flag" / Int16ul,  # 0xaa55
    "jump" / Int16ul,  # a jump to the end of this header; 2.00, as all that follows
    "header" / Bytes(4),  # "HdrS"
    "version" / Int16ul,  # of the protocol: 0x020f is 2.15
    "realmode_swtch" / Int32ul,
    "start_sys_seg" / Int16ul,
    "kernel_version" / Int16ul,  # less 0x200: where the version string begins; 0: none
    "type_of_loader" / Int8ul,
    "loadflags" / Int8ul,
    "setup_move_size" / Int16ul,
    "code32_start" / Int32ul,
    "ramdisk_image" / Int32ul,
    "ramdisk_size" / Int32ul,
    "bootsect_kludge" / Int32ul,
    "heap_end_ptr" / Int16ul,  # 2.01
    "ext_loader_ver" / Int8ul,  # 2.02
    "ext_loader_type" / Int8ul,  # 2.02
    "cmd_line_ptr" / Int32ul,  # 2.02
    "initrd_addr_max" / Int32ul,  # 2.03
    "kernel_alignment" / Int32ul,  # 2.05
    "relocatable_kernel" / Int8ul,  # 2.05
    "min_alignment" / Int8ul,  # 2.10
    "xloadflags" / Int16ul,  # 2.12; bit 0: 64-bit entry point
    "cmdline_size" / Int32ul,  # 2.06: longest command line without its NUL; before, 255
    "hardware_subarch" / Int32ul,  # 2.07
    "hardware_subarch_data" / Int64ul,  # 2.07
    "payload_offset" / Int32ul,  # 2.08: of the compressed kernel, from the protected-mode code
    "payload_length" / Int32ul,  # 2.08
    "setup_data" / Int64ul,  # 2.09
    "pref_address" / Int64ul,  # 2.10
    "init_size" / Int32ul,  # 2.10
    "handover_offset" / Int32ul,  # 2.11
    "kernel_info_offset" / Int32ul,  # 2.15
)

SINCE = {
    "syssize": 0x204,
    "heap_end_ptr": 0x201,
    "ext_loader_ver": 0x202,
    "ext_loader_type": 0x202,
    "cmd_line_ptr": 0x202,
    "initrd_addr_max": 0x203,
    "kernel_alignment": 0x205,
    "relocatable_kernel": 0x205,
    "min_alignment": 0x20A,
    "xloadflags": 0x20C,
    "cmdline_size": 0x206,
    "hardware_subarch": 0x207,
    "hardware_subarch_data": 0x207,
    "payload_offset": 0x208,
    "payload_length": 0x208,
    "setup_data": 0x209,
    "pref_address": 0x20A,
    "init_size": 0x20A,
    "handover_offset": 0x20B,
    "kernel_info_offset": 0x20F,
}
"""Fields that older kernels lack, by the protocol version that brought them."""

LOADED_HIGH = 0x01  # loadflags: bzImage, protected-mode code at 1 MiB
XLF_KERNEL_64 = 0x01  # xloadflags

# The arm64 Image header, at byte 0 (booting.rst, "Call the kernel image").
ARM64_HEADER = Struct(
    "code0" / Bytes(4),  # "MZ" and an instruction where there is an EFI stub
    "code1" / Bytes(4),
    "text_offset" / Int64ul,  # load offset
    "image_size" / Int64ul,  # in memory, from Linux 3.17 on
    "flags" / Int64ul,  # bit 0: big endian; 1-2: page size 4, 16, 64 KiB
    "res2" / Int64ul,
    "res3" / Int64ul,
    "res4" / Int64ul,
    "magic" / Bytes(4),  # "ARM\x64"
    "pe_offset" / Int32ul,
)

# EFI zboot: a PE file that holds a compressed Image.
ZBOOT_HEADER = Struct(
    "mz" / Const(b"MZ"),
    "pad" / Bytes(2),
    "magic" / Const(b"zimg"),
    "payload_offset" / Int32ul,
    "payload_size" / Int32ul,
    "reserved" / Bytes(8),
    "compression" / PaddedString(32, "ascii"),
    "linux_magic" / Bytes(4),  # 0x818223cd; older ones have none
    "pe_offset" / Int32ul,
)

PE_OFFSET = 0x3C
# The PE signature and the COFF machine behind it.
PE_HEADER = Struct("signature" / Bytes(4), "machine" / Int16ul)
MACHINES = {
    0x014C: "i386",
    0x8664: "x86_64",
    0xAA64: "arm64",
    0x01C2: "arm",
    0x5064: "riscv64",
    0x6264: "loongarch64",
}

CPIO_MAGICS = (b"070701", b"070702")
CPIO_TRAILER = b"TRAILER!!!"
# cpio "newc" and "crc": every number is eight hexadecimal digits.
CPIO_HEADER = Struct(
    "magic" / Bytes(6),
    "ino" / Bytes(8),
    "mode" / Bytes(8),
    "uid" / Bytes(8),
    "gid" / Bytes(8),
    "nlink" / Bytes(8),
    "mtime" / Bytes(8),
    "filesize" / Bytes(8),
    "devmajor" / Bytes(8),
    "devminor" / Bytes(8),
    "rdevmajor" / Bytes(8),
    "rdevminor" / Bytes(8),
    "namesize" / Bytes(8),  # with its NUL
    "check" / Bytes(8),
)
