//! TLS between hosts and for front ends: configurations from PEM files, the same rules everywhere.
//!
//! TLS 1.2 and 1.3 with the cipher suites that `rustls` recommends, by `ring`. Whoever asks for client certificates takes those
//! of one authority only; there is no list of revoked ones: an authority that has signed too much is replaced.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, crypto::ring};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use rustls::{
    ClientConfig, ClientConnection, Error, ServerConfig, ServerConnection, StreamOwned, pki_types::ServerName,
};

/// Bytes of the largest file that is read.
const PEM_FILE_LEN_MAX: u64 = 1 << 20;

/// Who we are: a certificate, the ones between it and its authority after it, and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Whether a server wants to know who its clients are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientCertificates {
    NotAsked,
    /// A client shows a certificate that the authority in this file has signed, or is refused.
    RequiredFrom(PathBuf),
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {path}")]
    Unreadable {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("{path} is longer than {PEM_FILE_LEN_MAX} bytes")]
    TooLong { path: PathBuf },
    #[error("{path} has no certificate in PEM form")]
    NoCertificate { path: PathBuf },
    #[error("{path} has no private key in PEM form without a password")]
    NoKey { path: PathBuf },
    #[error("{path} has a certificate that cannot be an authority")]
    BadAuthority { path: PathBuf },
    #[error("the certificate in {certificate} and the key in {key} cannot be used")]
    BadIdentity {
        certificate: PathBuf,
        key: PathBuf,
        #[source]
        cause: rustls::Error,
    },
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
}

/// What a server needs for its connections.
pub fn server_config(identity: &IdentityFiles, clients: &ClientCertificates) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?;
    let builder = match clients {
        ClientCertificates::NotAsked => builder.with_no_client_auth(),
        ClientCertificates::RequiredFrom(path) => {
            let roots = Arc::new(authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::new(ring::default_provider()))
                .build()
                .map_err(|_| TlsError::BadAuthority { path: path.clone() })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let (chain, key) = read_identity(identity)?;
    let config = builder.with_single_cert(chain, key).map_err(|cause| bad_identity(identity, cause))?;
    Ok(Arc::new(config))
}

/// What a client needs for its connections: the authority that signs servers, and who the client is if servers ask.
pub fn client_config(authority: &Path, identity: Option<&IdentityFiles>) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_root_certificates(authorities(authority)?);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let (chain, key) = read_identity(identity)?;
            builder.with_client_auth_cert(chain, key).map_err(|cause| bad_identity(identity, cause))?
        }
    };
    Ok(Arc::new(config))
}

fn bad_identity(identity: &IdentityFiles, cause: rustls::Error) -> TlsError {
    TlsError::BadIdentity { certificate: identity.certificate.clone(), key: identity.key.clone(), cause }
}

fn read_identity(identity: &IdentityFiles) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let chain = read_certificates(&identity.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&identity.key)?)
        .map_err(|_| TlsError::NoKey { path: identity.key.clone() })?;
    Ok((chain, key))
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots.add(certificate).map_err(|_| TlsError::BadAuthority { path: path.to_owned() })?;
    }
    Ok(roots)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let no_certificate = || TlsError::NoCertificate { path: path.to_owned() };
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(&read(path)?).collect::<Result<_, _>>().map_err(|_| no_certificate())?;
    if certificates.is_empty() { Err(no_certificate()) } else { Ok(certificates) }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    use std::io::Read;
    let unreadable = |cause| TlsError::Unreadable { path: path.to_owned(), cause };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(PEM_FILE_LEN_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > PEM_FILE_LEN_MAX {
        return Err(TlsError::TooLong { path: path.to_owned() });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A folder with an authority (`ca.pem`), and certificates that it has signed.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("polder-tls-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            let folder = Self(path);
            folder.openssl(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority \
                 -addext keyUsage=keyCertSign -keyout ca.key -out ca.pem",
            );
            folder
        }

        fn openssl(&self, arguments: &str) {
            let output = Command::new("openssl")
                .args(arguments.split_whitespace())
                .current_dir(&self.0)
                .output()
                .expect("this test needs openssl: `cargo xtask setup` installs it");
            assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        }

        fn identity(&self, name: &str) -> IdentityFiles {
            self.openssl(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={name} -CA ca.pem \
                 -CAkey ca.key -addext subjectAltName=DNS:{name} -addext basicConstraints=critical,CA:FALSE \
                 -keyout {name}.key -out {name}.pem"
            ));
            IdentityFiles { certificate: self.0.join(format!("{name}.pem")), key: self.0.join(format!("{name}.key")) }
        }

        fn authority(&self) -> PathBuf {
            self.0.join("ca.pem")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// Lets both sides talk until they agree, or one refuses.
    fn shake_hands(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Result<(), rustls::Error> {
        let mut client = ClientConnection::new(client, ServerName::try_from("server").unwrap())?;
        let mut server = ServerConnection::new(server)?;
        while client.is_handshaking() || server.is_handshaking() {
            let mut wire = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut wire).unwrap();
            }
            let mut rest = &wire[..];
            while !rest.is_empty() {
                server.read_tls(&mut rest).unwrap();
                server.process_new_packets()?;
            }
            wire.clear();
            while server.wants_write() {
                server.write_tls(&mut wire).unwrap();
            }
            let mut rest = &wire[..];
            while !rest.is_empty() {
                client.read_tls(&mut rest).unwrap();
                client.process_new_packets()?;
            }
        }
        Ok(())
    }

    #[test]
    fn only_certificates_of_the_right_authority_are_taken() {
        let (ours, theirs) = (Folder::new("ours"), Folder::new("theirs"));
        let server = ours.identity("server");
        let required = ClientCertificates::RequiredFrom(ours.authority());
        let open = server_config(&server, &ClientCertificates::NotAsked).unwrap();
        let strict = server_config(&server, &required).unwrap();
        let client = |folder: &Folder| client_config(&ours.authority(), Some(&folder.identity("client"))).unwrap();
        let anonymous = client_config(&ours.authority(), None).unwrap();
        shake_hands(anonymous.clone(), open).unwrap();
        shake_hands(client(&ours), strict.clone()).unwrap();
        assert!(shake_hands(anonymous, strict.clone()).is_err());
        assert!(shake_hands(client(&theirs), strict.clone()).is_err());
        let suspicious = client_config(&theirs.authority(), Some(&ours.identity("client"))).unwrap();
        assert!(shake_hands(suspicious, strict).is_err());
    }

    #[test]
    fn files_that_are_not_what_they_should_be_are_named() {
        let folder = Folder::new("files");
        let identity = folder.identity("server");
        let config = |certificate: &Path, key: &Path| {
            let identity = IdentityFiles { certificate: certificate.to_owned(), key: key.to_owned() };
            server_config(&identity, &ClientCertificates::NotAsked).map(|_| ()).unwrap_err()
        };
        let missing = folder.0.join("missing.pem");
        assert!(matches!(config(&missing, &identity.key), TlsError::Unreadable { path, .. } if path == missing));
        let swapped = config(&identity.key, &identity.key);
        assert!(matches!(swapped, TlsError::NoCertificate { path } if path == identity.key));
        let swapped = config(&identity.certificate, &identity.certificate);
        assert!(matches!(swapped, TlsError::NoKey { path } if path == identity.certificate));
        let other = folder.0.join("ca.key");
        assert!(matches!(config(&identity.certificate, &other), TlsError::BadIdentity { key, .. } if key == other));
        let long = folder.0.join("long.pem");
        std::fs::write(&long, vec![b'x'; PEM_FILE_LEN_MAX as usize + 1]).unwrap();
        assert!(matches!(config(&long, &identity.key), TlsError::TooLong { path } if path == long));
    }
}
