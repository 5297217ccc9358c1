//! A 32-bit program, made of bytes, because a machine may have no compiler for one.

use std::{
    env,
    fs::{self, Permissions},
    net::SocketAddrV4,
    os::unix::fs::PermissionsExt as _,
    process::{self, Command},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use nix::errno::Errno;

use crate::suite::skip;

/// Where the program is in its own memory.
const BASE: u32 = 0x0804_8000;
const HEADERS: u32 = 84;

/// Runs a program that connects a UDP socket to this address and ends. Returns its process id.
/// Skips the test if the machine cannot run it.
pub fn connect_udp(to: SocketAddrV4) -> anyhow::Result<u32> {
    if !cfg!(target_arch = "x86_64") {
        return skip("32-bit programs of another architecture");
    }
    let path = env::temp_dir().join(format!("tcp-udp-trace-{}", process::id()));
    fs::write(&path, program(to))?;
    fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    let mut child = loop {
        match Command::new(&path).spawn() {
            // A process that another test has just forked may still have the file open.
            Err(error) if error.raw_os_error() == Some(Errno::ETXTBSY as i32) => {
                sleep(Duration::from_millis(1));
            }
            Err(error) if error.raw_os_error() == Some(Errno::ENOEXEC as i32) => {
                return skip("this kernel runs no 32-bit programs");
            }
            child => break child.context("a 32-bit program")?,
        }
    };
    let status = child.wait()?;
    fs::remove_file(&path)?;
    ensure!(status.success(), "{status}");
    Ok(child.id())
}

fn program(to: SocketAddrV4) -> Vec<u8> {
    // The moves of a number to a register.
    const EAX: u8 = 0xb8;
    const ECX: u8 = 0xb9;
    const EDX: u8 = 0xba;
    const EBX: u8 = 0xbb;
    const INT_0X80: [u8; 2] = [0xcd, 0x80];
    const EAX_TO_EBX: [u8; 2] = [0x89, 0xc3];
    let put = |code: &mut Vec<u8>, opcode: u8, value: u32| {
        code.push(opcode);
        code.extend(value.to_le_bytes());
    };
    let mut code = Vec::new();
    // socket(AF_INET, SOCK_DGRAM, 0)
    put(&mut code, EAX, 359);
    put(&mut code, EBX, 2);
    put(&mut code, ECX, 2);
    put(&mut code, EDX, 0);
    code.extend(INT_0X80);
    // connect(socket, address, 16)
    code.extend(EAX_TO_EBX);
    put(&mut code, EAX, 362);
    let rest = 5 + 5 + 2 + 2 + 5 + 2;
    let address = BASE + HEADERS + code.len() as u32 + rest;
    put(&mut code, ECX, address);
    put(&mut code, EDX, 16);
    code.extend(INT_0X80);
    // exit(result)
    code.extend(EAX_TO_EBX);
    put(&mut code, EAX, 1);
    code.extend(INT_0X80);
    // A `struct sockaddr_in`.
    code.extend(2_u16.to_le_bytes());
    code.extend(to.port().to_be_bytes());
    code.extend(to.ip().octets());
    code.extend([0; 8]);

    let size = HEADERS + code.len() as u32;
    // The header of an executable of the i386, and its only segment.
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    for word in [1, BASE + HEADERS, 52, 0, 0] {
        file.extend(u32::to_le_bytes(word));
    }
    for half in [52_u16, 32, 1, 40, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for word in [1, 0, BASE, BASE, size, size, 5, 0x1000] {
        file.extend(u32::to_le_bytes(word));
    }
    file.extend(code);
    file
}
