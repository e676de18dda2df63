//! The smallest HTTP/1.1 client that a bench needs: one kept connection, one request at a time, no more processor time than
//! the sockets cost.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a port of this machine.
pub struct Client {
    stream: BufReader<TcpStream>,
    /// Sent with every request: whole lines.
    headers: String,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
    /// How old the copy may be that a stale read was answered from.
    pub age_ms: Option<u64>,
}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Client {
    /// Connects; every request will be for `host`, with `token` if there is one.
    pub fn connect(port: u16, host: &str, token: Option<&str>) -> io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let bearer = token.map(|t| format!("authorization: Bearer {t}\r\n")).unwrap_or_default();
        Ok(Self { stream: BufReader::with_capacity(64 << 10, stream), headers: format!("host: {host}\r\n{bearer}") })
    }

    /// Sends a header with every request from now on.
    pub fn header(&mut self, name: &str, value: &str) {
        self.headers.push_str(&format!("{name}: {value}\r\n"));
    }

    pub fn send(&mut self, method: &str, path: &str, content_type: &str, body: &[u8]) -> io::Result<Answer> {
        let mut request = format!("{method} {path} HTTP/1.1\r\n{}", self.headers);
        if !body.is_empty() {
            request.push_str(&format!("content-type: {content_type}\r\ncontent-length: {}\r\n", body.len()));
        }
        request.push_str("\r\n");
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body);
        self.stream.get_mut().write_all(&bytes)?;
        self.answer()
    }

    pub fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.send("GET", path, "", &[])
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }

    fn answer(&mut self) -> io::Result<Answer> {
        let first = self.line()?;
        let status = first.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.ok_or_else(|| broken(format!("no status line: {first:?}")))?;
        let (mut length, mut chunked, mut age_ms) = (0, false, None);
        loop {
            let line = self.line()?;
            let Some((name, value)) = line.split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().map_err(|_| broken(line.clone()))?,
                "transfer-encoding" => chunked = true,
                "x-cnx-stale-ms" => age_ms = value.trim().parse().ok(),
                _ => {}
            }
        }
        let mut body = Vec::new();
        if chunked {
            loop {
                let line = self.line()?;
                let size = usize::from_str_radix(line.split(';').next().unwrap_or_default(), 16);
                let size = size.map_err(|_| broken(format!("no size of a chunk: {line:?}")))?;
                self.read(&mut body, size)?;
                self.line()?;
                if size == 0 {
                    break;
                }
            }
        } else {
            self.read(&mut body, length)?;
        }
        Ok(Answer { status, body, age_ms })
    }

    fn read(&mut self, body: &mut Vec<u8>, more: usize) -> io::Result<()> {
        let start = body.len();
        body.resize(start + more, 0);
        self.stream.read_exact(&mut body[start..])
    }
}
