//! Certificates that members refuse before they expire, and the open connections of their holders.

use std::{
    collections::BTreeMap,
    future::Future as _,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{oneshot, watch},
};

use crate::{CaCertificate, MemberCertificate};

/// By subject (see [`crate::Member::subject`]): certificates issued at this time or earlier are refused, in seconds
/// since the Unix epoch.
pub type RevocationList = BTreeMap<String, i64>;

/// The revocation list, and the open connections that it may close.
#[derive(Debug, Default)]
pub struct Revocations {
    list: watch::Sender<Arc<RevocationList>>,
    open: Mutex<Vec<OpenConnection>>,
}

#[derive(Debug)]
struct OpenConnection {
    certificate: MemberCertificate,
    close: oneshot::Sender<()>,
}

impl Revocations {
    /// Replaces the list, and closes the connections of members that it revokes.
    pub fn replace(&self, list: RevocationList) {
        self.list.send_replace(Arc::new(list));
        self.close(|certificate| self.revoked_at(certificate).is_some());
    }

    /// Closes the connections of members whose certificates name an issuer that is not among `trusted`.
    pub fn close_untrusted(&self, trusted: &[CaCertificate]) {
        self.close(|certificate| {
            let issuer = &certificate.issuer_key_id;
            !issuer.is_empty() && trusted.iter().all(|authority| authority.key_id != *issuer)
        });
    }

    fn close(&self, is_refused: impl Fn(&MemberCertificate) -> bool) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = std::mem::take(&mut *open);
        for connection in connections {
            if is_refused(&connection.certificate) {
                // It may have been closed by its peer.
                let _ = connection.close.send(());
            } else if !connection.close.is_closed() {
                open.push(connection);
            }
        }
    }

    /// The list, now and after each change.
    pub fn subscribe(&self) -> watch::Receiver<Arc<RevocationList>> {
        self.list.subscribe()
    }

    /// When the certificate's member was revoked, in seconds since the Unix epoch; `None` if the certificate is good.
    pub fn revoked_at(&self, certificate: &MemberCertificate) -> Option<i64> {
        let revoked_at = *self.list.borrow().get(&certificate.member.subject()?)?;
        (certificate.issued_at <= revoked_at).then_some(revoked_at)
    }

    /// Resolves once the certificate is revoked; `None` if it is already.
    pub fn watch(&self, certificate: &MemberCertificate) -> Option<Revoked> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, so that no replacement falls between the look and the registration.
        if self.revoked_at(certificate).is_some() {
            return None;
        }
        if open.len() == open.capacity() {
            open.retain(|connection| !connection.close.is_closed());
        }
        let (close, closed) = oneshot::channel();
        open.push(OpenConnection { certificate: certificate.clone(), close });
        Some(Revoked(Some(closed)))
    }
}

/// Resolves once a certificate is revoked, or its authority is trusted no longer.
#[derive(Debug)]
pub struct Revoked(Option<oneshot::Receiver<()>>);

impl Revoked {
    /// Ready once the certificate is revoked.
    pub(crate) fn poll_revoked(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(closed) = &mut self.0 else { return Poll::Pending };
        match Pin::new(closed).poll(cx) {
            Poll::Ready(Ok(())) => Poll::Ready(()),
            // The list is gone, and with it whoever could revoke.
            Poll::Ready(Err(_)) => {
                self.0 = None;
                Poll::Pending
            }
            Poll::Pending => Poll::Pending,
        }
    }

    pub(crate) fn error() -> io::Error {
        io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the peer's certificate was revoked, or its authority is trusted no longer",
        )
    }
}

/// A stream that fails once its peer's certificate is revoked.
#[derive(Debug)]
pub struct Revocable<S> {
    stream: S,
    revoked: Revoked,
}

impl<S> Revocable<S> {
    pub(crate) fn new(stream: S, revoked: Revoked) -> Self {
        Self { stream, revoked }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Revocable<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.revoked.poll_revoked(cx).is_ready() {
            return Poll::Ready(Err(Revoked::error()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Revocable<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use tokio::io::AsyncReadExt as _;

    use super::*;
    use crate::{Authority, Member};

    fn certificate(node: &str, issued_at: u64) -> MemberCertificate {
        let authority = Authority::generate("main").unwrap();
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(issued_at);
        let member = Member::node(node).unwrap();
        let issued = authority.issue_at(&member, &[], Duration::from_secs(3600), at).unwrap();
        MemberCertificate::from_pem(&issued.certificate_pem).unwrap()
    }

    #[test]
    fn certificates_issued_before_a_revocation_are_refused_and_later_ones_are_not() {
        let revocations = Revocations::default();
        revocations.replace([("node/a".to_owned(), 1_000_000)].into());
        assert_eq!(revocations.revoked_at(&certificate("a", 999_999)), Some(1_000_000));
        assert_eq!(revocations.revoked_at(&certificate("a", 1_000_001)), None);
        assert_eq!(revocations.revoked_at(&certificate("b", 999_999)), None);
        assert!(revocations.watch(&certificate("a", 1)).is_none());
    }

    #[tokio::test]
    async fn an_open_connection_ends_when_its_peer_is_revoked() {
        let revocations = Revocations::default();
        let (peer, _held) = tokio::io::duplex(16);
        let (other, _other) = tokio::io::duplex(16);
        let mut peer = Revocable::new(peer, revocations.watch(&certificate("a", 1000)).unwrap());
        let mut other = Revocable::new(other, revocations.watch(&certificate("b", 1000)).unwrap());
        let reading = tokio::spawn(async move { peer.read_u8().await });
        tokio::task::yield_now().await;
        revocations.replace([("node/a".to_owned(), 2000)].into());
        assert_eq!(reading.await.unwrap().unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(futures::poll!(std::pin::pin!(other.read_u8())).is_pending(), "another node's goes on");
    }
}
